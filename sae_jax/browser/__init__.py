"""The feature browser: data files and the static page that reads them."""
