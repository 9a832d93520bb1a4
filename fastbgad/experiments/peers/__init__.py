"""Methods of other authors on the same images and features."""
