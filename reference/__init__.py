"""The reference pipeline: from images to a ResNet trained with ConAdv."""
