"""Images: the U-Net, the experiment, the pictures."""
