"""Training data: photographs with what is known about the face in them."""
