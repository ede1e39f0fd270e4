"""What a gateway in one process and a relay of its own have in common: how they listen, and collect garbage."""

from __future__ import annotations

import gc
import logging
import ssl

from chiron.gateway.relay.admission import Models, ServedModel
from chiron.gateway.settings import ModelSettings, ServeConfig
from chiron.net.files import files_max
from chiron.net.limits import ServerLimits
from chiron.net.renewing import RenewingContext, for_server

log = logging.getLogger("chiron.gateway")

GC_THRESHOLD = 500_000
"""More objects than at the last collection, until the next. Requests are freed by counting references, and a collection
looks at all that are open: with 20,000 of them it holds the loop for a tenth of a second and finds nothing."""
FILES_BESIDES = 64
"""File descriptors for the store, logs, scrapes; of the others each client's connection may need one for an engine."""


def collect_rarely() -> None:
    """What has been made so far stays; the collector need not look at it again and again."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(GC_THRESHOLD, 50, 100)


def models_of(config: ServeConfig) -> Models:
    """All that clients may name."""
    cascades = {model.name: _cascade(config, model) for model in config.cascades}
    return Models(served_models(config), cascades)


def served_models(config: ServeConfig) -> dict[str, ServedModel]:
    """The config's models, of which nothing is known yet, by name."""
    return {model.name: _served(config, model) for model in config.models}


def tls_context(config: ServeConfig) -> ssl.SSLContext | None:
    """Its certificate is that of the files as they are at each handshake."""
    if not config.server.tls:
        return None
    files = (config.server.tls_cert, config.server.tls_key)

    def make() -> ssl.SSLContext:
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.load_cert_chain(*files, password="")  # Nobody is there to be asked for one.
        return context

    return for_server(RenewingContext(make, files))


def server_limits(config: ServeConfig, processes: int = 1) -> ServerLimits:
    """Of one of so many processes: connections and memory are divided among them."""
    limits, files = config.limits, files_max()
    asked = -(-limits.connections_max // processes)
    connections_max = min(asked, max(8, (files - FILES_BESIDES) // 2))
    if connections_max < asked:
        log.warning(
            "at most %d connections instead of limits.connections_max = %d: this process may have %d file descriptors "
            "(ulimit -n), and a request needs two",
            connections_max,
            asked,
            files,
        )
    return ServerLimits(
        body_max_bytes=limits.body_max_bytes,
        bodies_max_bytes=max(limits.body_max_bytes, limits.bodies_max_bytes // processes),
        header_max_bytes=limits.header_max_bytes,
        headers_max=limits.headers_max,
        host_required=True,
        connections_max=connections_max,
        peer_share=limits.peer_share,
        trusted_proxies=config.server.trusted_proxies,
        files_max=files,
        idle_s=limits.idle_s,
        header_timeout_s=limits.header_timeout_s,
        body_timeout_s=limits.body_timeout_s,
        stall_s=limits.client_stall_s,
    )


def _served(config: ServeConfig, model: ModelSettings) -> ServedModel:
    classes = {name: config.classes[name] for name in model.classes}
    return ServedModel(
        settings=model,
        classes=classes,
        kv_capacity_tokens=max(kind.kind.kv_capacity_tokens for kind in model.kinds),
    )


def _cascade(config: ServeConfig, model: ModelSettings) -> ServedModel:
    """What fits is a question to its parts."""
    classes = {name: config.classes[name] for name in model.classes}
    return ServedModel(settings=model, classes=classes, kv_capacity_tokens=1 << 40)
