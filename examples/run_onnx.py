"""Scores images with a detector that `fastbgad export` wrote; needs onnxruntime, numpy and pillow only.

    python examples/run_onnx.py detector.onnx photo.png more/*.png

Prints a line per image: score, side of the explicit boundary, share of the pixels beyond it, file.
"""

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image, ImageOps


def read(path, size, depth):
    """An image file as the model wants it: float32 [1, 3, height, width], RGB in [0, 1]; `depth` is of 16-bit files."""
    with Image.open(path) as image:
        if misread(image, path, depth not in (None, 16)):
            sys.exit(f"{path}: pillow misreads 16-bit files of this kind; save it as a gray PNG")
        upright = ImageOps.exif_transpose(image)
        if upright.mode == "F" or upright.mode.startswith("I"):
            gray, limit = np.array(upright), 1 if upright.mode == "F" else 2 ** (depth or 16) - 1
            if not (gray.min() >= 0 and gray.max() <= limit):
                sys.exit(f"{path}: its values {gray.min()} to {gray.max()} are outside of the model's 0 to {limit}")
            if limit > 1 and depth is None and gray.max() < 2**14:
                sys.exit(f"{path}: it uses few of its 16 bits, and the model does not know how many; save it in 8 bits")
            upright = Image.fromarray(np.rint(gray * (255 / limit)).astype(np.uint8))
        upright = upright.convert("RGB").resize(size[::-1], Image.Resampling.BILINEAR)  # drops alpha
    return np.ascontiguousarray((np.asarray(upright, np.float32) / 255).transpose(2, 0, 1)[None])


def misread(image, path, few_bits):
    """True for 16-bit files of color whose lower bits count, of separate planes, or on which white is 0."""
    if image.format == "TIFF" and max(image.tag_v2.get(258, (8,))) > 8:
        color, planes = image.tag_v2.get(277, 1) > 1, image.tag_v2.get(284) == 2
        return image.tag_v2.get(262) == 0 or (color and (planes or few_bits))
    return image.format == "PNG" and few_bits and image.mode[0] != "I" and Path(path).read_bytes()[24] == 16


def main(model, *paths):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors only
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    texts = session.get_modelmeta().custom_metadata_map
    size, sides, depth = (json.loads(texts.get(f"fastbgad.{k}", "null")) for k in ("image_size", "sides", "bit_depth"))
    for path in paths:
        images = read(path, size, depth)
        # There are more outputs: anomaly_map, and log_likelihood_0, 1, ... of the feature levels.
        score, side, decision = session.run(["image_score", "image_side", "decision"], {"images": images})
        print(f"{score[0]:.5f}  {sides[side[0]]:9}  {(decision == 2).mean():6.2%}  {path}")


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # names that are not UTF-8
    if len(sys.argv) < 3:
        sys.exit("usage: run_onnx.py DETECTOR.onnx IMAGE...")
    main(*sys.argv[1:])
