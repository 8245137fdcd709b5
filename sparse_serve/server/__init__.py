"""What every API of the server shares: settings, metrics, admission of requests, the HTTP port."""
