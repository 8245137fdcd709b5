"""Metrics of the server, beside those of vLLM (which uses the prefix `vllm:` and the same registry).

Base units and Prometheus names; the registry is an argument, so that two servers in one process (tests) do not collide.
`cancelled` exists because vLLM's own count of finished requests leaves out those a client walked away from.
"""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from sparse_serve.engine import EngineInfo

_SECONDS = (0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """The server's own metrics, registered in `registry`."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.registry = registry
        self.requests = Counter(
            "sparse_serve_requests",
            "Requests answered, by API, method and result (gRPC code or HTTP status)",
            ["api", "method", "code"],
            registry=registry,
        )
        self.cancelled = Counter(
            "sparse_serve_cancelled",
            "Requests given up by the client (cancel, deadline, disconnect) and aborted in the engine",
            ["api"],
            registry=registry,
        )
        self.truncated = Counter(
            "sparse_serve_truncated_streams",
            "Answers that began and have no end: the client left, its deadline passed, it did not read, the drain was "
            "over, the engine died, an operator aborted them, or an error",
            ["api", "cause"],
            registry=registry,
        )
        self.rejected = Counter(
            "sparse_serve_client_rejections",
            "Requests refused because their client had too much running (a full queue: vllm:admission_rejections)",
            registry=registry,
        )
        self.in_flight = Gauge("sparse_serve_in_flight_requests", "Requests being answered", ["api"], registry=registry)
        self.seconds = Histogram(
            "sparse_serve_request_seconds",
            "Time from a request's arrival to the end of its answer",
            ["api", "method"],
            buckets=_SECONDS,
            registry=registry,
        )
        self.ready = Gauge("sparse_serve_ready", "1 while requests are taken, else 0", registry=registry)
        self.startup_seconds = Gauge(
            "sparse_serve_startup_seconds", "Time that each part of the start took", ["phase"], registry=registry
        )
        self.sparse_layers = Gauge(
            "sparse_serve_sparse_layers", "Linear layers served sparse", ["kernel"], registry=registry
        )
        self.kernel_speedup = Gauge(
            "sparse_serve_kernel_speedup",
            "Time of a dense layer by time of the kernel chosen, as measured, for up to so many tokens",
            ["out_features", "in_features", "values", "tokens", "kernel"],
            registry=registry,
        )
        self.dense_layers = Gauge("sparse_serve_dense_layers", "Linear layers served dense", registry=registry)
        self.weight_bytes = Gauge(
            "sparse_serve_weight_bytes",
            "Weights of the sparse layers: as resident in memory, and as they would be dense",
            ["kind"],
            registry=registry,
        )

    def show(self, info: EngineInfo) -> None:
        """Export what a started engine serves."""
        for phase, seconds in info.startup_s.items():
            self.startup_seconds.labels(phase).set(seconds)
        for kernel, layers in info.kernels.items():
            self.sparse_layers.labels(kernel).set(layers)
        for choice in info.choices:
            labels = (choice.out_features, choice.in_features, choice.values, choice.tokens, choice.kernel)
            self.kernel_speedup.labels(*labels).set(choice.speedup)
        self.dense_layers.set(info.dense_layers)
        self.weight_bytes.labels("resident").set(info.sparse_weight_bytes)
        self.weight_bytes.labels("dense_equivalent").set(info.dense_equivalent_bytes)
