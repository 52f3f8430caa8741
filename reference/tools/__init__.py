"""What commands beside the main one are made of."""
