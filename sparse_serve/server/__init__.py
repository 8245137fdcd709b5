"""What APIs share (settings, metrics, admission of requests, the HTTP port), and the server's lifecycle."""
