"""One HTML page that compares training runs: `page` writes it, the other files make its parts."""
