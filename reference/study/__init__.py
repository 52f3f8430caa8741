"""Many runs on images in memory, and what they show together."""
