"""Where runs, stores and models lie: what a URL is."""
