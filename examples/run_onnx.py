"""Scores images with a detector that `fastbgad export` wrote; needs onnxruntime, numpy and pillow only.

    python examples/run_onnx.py detector.onnx photo.png more/*.png

Prints a line per image: score, side of the explicit boundary, share of the pixels beyond it, file.
"""

import json
import sys

import numpy as np
import onnxruntime
from PIL import Image, ImageOps


def read(path, size, depth):
    """An image file as the model wants it: float32 [1, 3, height, width], RGB in [0, 1].

    `depth` is that of 16-bit files; None if the model was trained on none.
    """
    height, width = size
    with Image.open(path) as image:
        refuse_what_pillow_misreads(image, path, depth)
        upright = ImageOps.exif_transpose(image)
        if upright.mode == "F" or upright.mode.startswith("I"):
            gray, limit = np.array(upright), 1 if upright.mode == "F" else 2 ** (depth or 16) - 1
            if not (gray.min() >= 0 and gray.max() <= limit):
                sys.exit(f"{path}: its values {gray.min()} to {gray.max()} are outside of the model's 0 to {limit}")
            if limit > 1 and depth is None and gray.max() < 2**14:
                sys.exit(f"{path}: it uses few of its 16 bits, and the model does not know how many; save it in 8 bits")
            upright = Image.fromarray(np.rint(gray * (255 / limit)).astype(np.uint8))
        upright = upright.convert("RGB")  # drops alpha
    pixels = np.asarray(upright.resize((width, height), Image.Resampling.BILINEAR), np.float32) / 255
    return np.ascontiguousarray(pixels.transpose(2, 0, 1)[None])


def refuse_what_pillow_misreads(image, path, depth):
    """Exit for 16-bit files of which pillow reads 8 bits where fewer are used, or planes and scales wrongly."""
    few_bits = depth not in (None, 16)
    if image.format == "PNG" and few_bits and not image.mode.startswith("I"):
        with open(path, "rb") as file:
            if file.read(25)[24] == 16:
                sys.exit(f"{path}: pillow reads 8 of the 16 bits, of which the model uses {depth}; save it as gray")
    if image.format == "TIFF" and max(image.tag_v2.get(258, (8,))) > 8:
        white_is_zero, color = image.tag_v2.get(262) == 0, image.tag_v2.get(277, 1) > 1
        planes = image.tag_v2.get(284) == 2
        if white_is_zero or (color and (planes or few_bits)):
            sys.exit(f"{path}: pillow misreads 16-bit TIFF files of this kind; save it as a PNG")


def main(model, *paths):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors only
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    metadata = session.get_modelmeta().custom_metadata_map
    size, sides = json.loads(metadata["fastbgad.image_size"]), json.loads(metadata["fastbgad.sides"])
    depth = json.loads(metadata.get("fastbgad.bit_depth", "null"))
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
