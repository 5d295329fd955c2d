"""Where data lies: URLs, files that are whole or absent, claimed folders."""
