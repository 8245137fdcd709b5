"""The APIs of the server. A file is an API and its name is the API's name; The parts of the gRPC API
(`grpc_access`, `grpc_calls`, ...) and the generated `pb` are the exception.

An API's file defines `create(context: ServerContext) -> Api`, both of `sparse_serve.server.context`. The server calls:

    start    before the engine: answer at once, with "unavailable"
    serve    the engine is up: be able to take requests
    drain    tell health checks that this replica is leaving
    stop     end what still runs after `grace_s`, close

APIs do not import each other. What they need is in the `ServerContext`: the engine, the settings, the HTTP listener to
mount on, and the `Admission`, which says whether requests are taken and counts those being answered.
"""
