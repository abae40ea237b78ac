"""Numbers and tables from records. Reads what `bench` wrote; never imports torch."""
