"""Models: images and visibility in, predictions or features out. None draws a mask, none computes a loss."""
