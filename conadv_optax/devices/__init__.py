"""Groups of examples with batch statistics of their own."""
