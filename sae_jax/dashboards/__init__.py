"""What the dashboards of others are made of, from finished results."""
