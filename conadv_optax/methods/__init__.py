"""Other large-batch methods, each by itself or around `wrap`."""
