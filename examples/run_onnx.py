"""Scores images with a detector that `fastbgad export` wrote; needs onnxruntime, numpy and pillow only.

    python examples/run_onnx.py detector.onnx photo.png more/*.png

Prints a line per image: score, side of the explicit boundary, share of the pixels beyond it, file.
"""

import json
import sys

import numpy as np
import onnxruntime
from PIL import Image, ImageOps


def read(path, size):
    """An image file as the model wants it: float32 [1, 3, height, width], RGB in [0, 1]."""
    height, width = size
    with Image.open(path) as image:
        upright = ImageOps.exif_transpose(image).convert("RGB")
    pixels = np.asarray(upright.resize((width, height), Image.Resampling.BILINEAR), np.float32) / 255
    return np.ascontiguousarray(pixels.transpose(2, 0, 1)[None])


def main(model, *paths):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors only
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    metadata = session.get_modelmeta().custom_metadata_map
    size, sides = json.loads(metadata["fastbgad.image_size"]), json.loads(metadata["fastbgad.sides"])
    for path in paths:
        images = read(path, size)
        # There are more outputs: anomaly_map, and log_likelihood_0, 1, ... of the feature levels.
        score, side, decision = session.run(["image_score", "image_side", "decision"], {"images": images})
        print(f"{score[0]:.5f}  {sides[side[0]]:9}  {(decision == 2).mean():6.2%}  {path}")


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit("usage: run_onnx.py DETECTOR.onnx IMAGE...")
    main(*sys.argv[1:])
