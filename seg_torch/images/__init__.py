"""Reading and resizing of images."""
