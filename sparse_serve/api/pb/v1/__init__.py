"""Messages and stubs of the `sparse_serve.v1` protocol; not edited by hand."""
