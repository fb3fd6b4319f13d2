"""What is shown: overlays, curves, pages, outlines."""
