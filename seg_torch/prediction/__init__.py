"""From images to segmentations, and to the files that are made of them."""
