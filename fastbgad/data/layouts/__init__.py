"""Datasets as folders: which layouts are known, and how their images and masks are listed.

| layout     | dataset             | normal images: training, test          | anomalous images, masks                  |
|------------|---------------------|----------------------------------------|------------------------------------------|
| mvtec      | MVTec AD, MPDD, ... | train/good, test/good                  | test/<type>, ground_truth/<type>         |
| mvtec_ad_2 | MVTec AD 2          | train/good, test_public/good           | test_public/bad and /ground_truth        |
| loco       | MVTec LOCO AD       | train/good, test/good                  | test/<type>, ground_truth/<type>/<image> |
| mvtec_3d   | MVTec 3D-AD (rgb)   | train/good/rgb, test/good/rgb          | test/<type>/rgb, test/<type>/gt          |
| btad       | BTAD                | train/ok, test/ok                      | test/ko, ground_truth/ko                 |
| visa       | VisA                | Data/Images/Normal, split_csv/1cls.csv | Data/Images/Anomaly, Data/Masks/Anomaly  |
| kolektor   | KolektorSDD         | kos*/Part*.jpg (a share held out)      | the same, kos*/Part*_label.bmp           |
| kolektor2  | KolektorSDD2        | train, test                            | the same, *_GT.png                       |
| real_iad   | Real-IAD            | OK and a JSON file                     | NG/<type>, masks beside them             |
| folder     | your own            | normal (a share held out), test_normal | anomalous[/<type>], masks[/<type>]       |

Folders are searched recursively. A mask carries its image's name, with or without `_mask`, and any image suffix; or it
is a folder with the image's name, whose files are its parts.
"""

from __future__ import annotations

from .kinds import KINDS, PLAIN, Layout, kind_of, list_samples, title_of
from .listing import FileOptions, Listing
from .plain import FolderLayout

__all__ = ["KINDS", "PLAIN", "FileOptions", "FolderLayout", "Layout", "Listing", "kind_of", "list_samples", "title_of"]
