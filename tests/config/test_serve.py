"""The serve config: three lines are enough, mistakes are refused with their path, secrets are not shown."""

from __future__ import annotations

import re
import sys
from dataclasses import replace
from math import inf
from pathlib import Path

import pytest

pytest.importorskip("httptools")
pytest.importorskip("psutil")

from chiron.cli.init import PLACEHOLDER, template
from chiron.config.overrides import override_text
from chiron.config.read import ConfigError, keys_of
from chiron.config.serve import DEFAULT_CLASSES, load_serve, parse_serve
from chiron.core.units import SizeError, parse_size
from chiron.engines.rows import ENGINES
from chiron.fleet.endpoints import EndpointsSource
from chiron.fleet.health import HealthSettings, RecoverySettings
from chiron.fleet.process.fleet import ProcessSource
from chiron.fleet.ray.source import RaySource
from chiron.fleet.settings import FleetSettings
from chiron.fleet.starts import BackoffSettings
from chiron.gateway.relay.keys import hash_secret
from chiron.gateway.relay.uplink.joining import StaySettings
from chiron.gateway.settings import BatchSettings, LimitSettings, ServeConfig, ServerSettings, TelemetrySettings
from chiron.store.postgres.settings import PostgresSettings
from chiron.store.settings import StoreSettings

THREE_LINES = """
[models."llama-3.1-8b"]
engine = "vllm"
endpoints = ["http://127.0.0.1:8001"]
"""
HASH = hash_secret(b"sk-some-secret")


def parse(text: str = THREE_LINES, *overrides: str, policy: str | None = None) -> ServeConfig:
    return parse_serve("".join([text, *map(override_text, overrides)]), directory=Path("/nowhere"), policy=policy)


def one(engine: str, *lines: str) -> ServeConfig:
    return parse("\n".join(["[models.m]", f'engine = "{engine}"', *lines]))


def urls(config: ServeConfig) -> tuple[str, ...]:
    source = config.models[0].kinds[0].source
    assert isinstance(source, EndpointsSource)
    return source.urls


def process(config: ServeConfig, kind: int = 0) -> ProcessSource:
    source = config.models[0].kinds[kind].source
    assert isinstance(source, ProcessSource)
    return source


def test_three_lines_are_enough() -> None:
    config = parse()
    (model,) = config.models
    assert (model.name, model.default_class, model.batch_class) == ("llama-3.1-8b", "chat", "batch")
    assert (model.min_instances, model.max_instances) == (1, 1)
    assert urls(config) == ("http://127.0.0.1:8001",)
    assert model.spec().kinds[0].name == "llama-3.1-8b/vllm"
    assert (config.policy, config.server.host, config.server.port) == ("chiron", "127.0.0.1", 8000)
    assert config.classes == DEFAULT_CLASSES
    assert config.data == Path("/nowhere/chiron-data")
    assert config.event_log == Path("/nowhere/chiron-data/events.jsonl")


@pytest.mark.parametrize(
    ("section", "name"),
    [
        ("models", "llama-3.1-8b"),
        ("models", "Qwen2.5-0.5B-Instruct"),
        ("models", "gpt-4.1"),
        ("classes", "chat.v2"),
        ("policies", "chiron-1.5"),
    ],
)
def test_a_name_with_dots_without_quotes_is_told_how_to_write_it(section: str, name: str) -> None:
    lines = {
        "models": 'engine = "vllm"\nendpoints = ["http://127.0.0.1:8001"]',
        "classes": 'kind = "interactive"',
        "policies": 'policy = "static"',
    }
    text = f"[{section}.{name}]\n{lines[section]}\n" + (THREE_LINES if section != "models" else "")
    with pytest.raises(ConfigError, match=re.escape(f'a name with dots needs quotes: [{section}."{name}"]')):
        parse(text)
    assert parse(text.replace(name, f'"{name}"')).models


def test_endpoints_are_all_used_and_no_more_than_there_are() -> None:
    config = one("vllm", 'endpoints = ["http://127.0.0.1:1/v1", "https://localhost", "http://[::1]:9"]')
    assert urls(config) == ("http://127.0.0.1:1", "https://localhost", "http://[::1]:9")
    assert (config.models[0].min_instances, config.models[0].max_instances) == (3, 3)
    with pytest.raises(ConfigError, match=r"max_instances: 2; there are 1 endpoints"):
        one("vllm", 'endpoints = ["http://127.0.0.1:1"]', "max_instances = 2")


def test_every_engine_that_chiron_ships_starts_from_one_line() -> None:
    config = one("openvino")
    toy = process(config)
    assert toy.command[:3] == (sys.executable, "-m", "chiron.engines.serve.openvino")
    assert toy.command[toy.command.index("--model") + 1] == "toy"
    assert (toy.gpus, config.models[0].kinds[0].kv_capacity_known) == (0, False)
    emulated = one("emulated", 'profile = "llama-3.1-8b/a100/tp1"').models[0]
    assert (emulated.kinds[0].kind.gpu, emulated.kinds[0].source.gpus, emulated.max_instances) == ("a100", 0, 50)
    assert emulated.kinds[0].kv_capacity_known


def test_token_budgets_of_starts_reach_commands_that_name_them() -> None:
    named = 'args = ["--max-num-batched-tokens", "{max_num_batched_tokens}"]'
    for config, starts in (
        (one("openvino"), True),
        (one("vllm", 'model_path = "org/name"', named), True),
        (one("vllm", 'model_path = "org/name"'), False),
    ):
        assert ("{max_num_batched_tokens}" in process(config).command) == starts
        assert config.models[0].kinds[0].kind.start_token_budget == starts
    assert not one("vllm", 'endpoints = ["http://127.0.0.1:1"]').models[0].kinds[0].kind.start_token_budget


def test_vllm_is_started_from_a_model_path_and_takes_gpus() -> None:
    kind = process(one("vllm", 'model_path = "org/name"', "gpus = 2", 'args = ["--dtype", "bfloat16"]'))
    assert kind.command[:3] == ("vllm", "serve", "org/name")
    assert "{port}" in kind.command
    assert kind.command[-2:] == ("--dtype", "bfloat16")
    assert kind.gpus == 2


def test_keys_of_the_model_are_defaults_of_its_instances() -> None:
    config = one("vllm", 'instances = [{ name = "a", gpu = "a100" }, { name = "b" }]', 'model_path = "x"')
    kinds = config.models[0].kinds
    assert [kind.kind.name for kind in kinds] == ["m/a", "m/b"]
    assert [kind.kind.gpu for kind in kinds] == ["a100", "gpu"]
    assert [process(config, i).command[2] for i in (0, 1)] == ["x", "x"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("model={}", r"model: unknown key .*did you mean 'models'"),
        ("models.m={}", r"models\.m: engine is missing; one of: vllm, "),
        ("models.m.engine=vlm", r"models\.m: engine is 'vlm'; did you mean 'vllm'"),
        ("models.m={engine='vllm'}", r"models\.m: endpoints, command or model_path is missing"),
        ("models.m={engine='tgi'}", r"models\.m: endpoints or command is missing; .* start tgi"),
        ("models.m={engine='emulated'}", r"models\.m: profile is missing"),
        ("models.m={engine='emulated', profile='x'}", r"models\.m\.profile: profile 'x' is neither packaged nor"),
        ("models.m={engine='openvino', profile='x'}", r"models\.m\.profile: 'x'; it belongs to engine = 'emulated'"),
        ("models.m={engine='openvino', model_path='no.gguf'}", r"model_path: 'no\.gguf': there is no such file"),
        ("models.m={engine='command', command=['x']}", r"models\.m\.command: 'x' must contain \{port\}"),
        (
            "models.m={engine='emulated', profile='llama-3.1-8b/a100/tp1', threads=2}",
            r"models\.m\.threads: 2; it belongs to engine = 'llamacpp' or 'openvino'",
        ),
        ("models.m={engine='openvino', threads=0}", r"models\.m: threads is 0; it must be 1 or more"),
        ("models.m={engine='openvino', thread=1}", r"models\.m\.thread: unknown key .*did you mean 'threads'"),
        ("models.m={engine='openvino', instances=[]}", r"models\.m\.instances: \[\] must be a list"),
        ("models.m={engine='openvino', instances=[{}, {}]}", r"instances\[1\]: another kind .* give each a name"),
        ("models.m={engine='openvino', max_instances=2, min_instances=3}", r"min_instances is 3; it must be at most"),
        ("models.m={engine='openvino', classes=['chatt']}", r"models\.m\.classes\[0\]: unknown name 'chatt'; did you"),
        ("models.m={engine='openvino', default_class='batch'}", r"default_class: 'batch' must be .* 'interactive'"),
        ("models.m={engine='openvino', aliases=['llama-3.1-8b']}", r"'llama-3\.1-8b' names both"),
        (
            'models."llama-3.1-8b".endpoints=["ftp://x"]',
            r'models\."llama-3\.1-8b"\.endpoints\[0\]: \'ftp://x\' must be',
        ),
        ('models."llama-3.1-8b".endpoints=["http://localhost/api"]', r"has the path '/api'"),
        (
            'models."llama-3.1-8b".endpoints=["http://localhost:99999"]',
            r"endpoints\[0\]: 'http://localhost:99999': Port out of range",
        ),
        ('models."llama-3.1-8b".endpoints=["http://127.0.0.1:8000"]', r"where Chiron itself listens"),
        (
            'models."llama-3.1-8b".endpoints=["http://127.0.0.1:1", "http://127.0.0.1:1/v1"]',
            r"endpoints\[1\]: 'http://127.0.0.1:1/v1' is .*endpoints\[0\] again; name each endpoint once",
        ),
        ('models."llama-3.1-8b".env={A="b"}', r"env is \{'A': 'b'\}; it belongs to engines that Chiron starts"),
        ('models."llama-3.1-8b".api_key_file="no.key"', r"api_key_file: 'no\.key' cannot be read"),
        ("server.port=70000", r"server: port is 70000; it must be 0 to 65535"),
        ("server.tls_cert=a.pem", r"server: tls_key is ''; it must be set together with tls_cert"),
        ("server.host=0.0.0.0", r"server\.host: '0\.0\.0\.0' can be reached .*chiron key"),
        ("limits.body_max_bytes=32Mb2", r"limits\.body_max_bytes: size '32Mb2': expected a whole number of bytes"),
        (
            "limits.bodies_max_bytes=1MiB",
            r"bodies_max_bytes is 1048576; it must be body_max_bytes \(33554432\) at least",
        ),
        ("limits.queue_max=0", r"limits: queue_max is 0; it must be above 0"),
        ("limits.idle=-1", r"limits\.idle: duration -1"),
        ("batch.completion_window_min=31d", r"batch: completion_window_min is 2678400\.0; it must be at most"),
        ("store.retention=1d", r"store\.retention: unknown key"),
        ("store.url=mysql://a:secret@b/c", r"store: url: must be postgresql://USER@HOST:PORT/DATABASE$"),
        ("store.uri=postgresql://a:secret@b/c", r"store\.uri: unknown key; (?!.*secret)"),
        ("store.lease=10s", r"store\.lease: is for PostgreSQL: set store\.url as well"),
        ("store='sqlite'", r"store: url: must be postgresql"),
        ("gateways='gw-1'", r"gateways: must be a table with certificate, key and ca"),
        ("gateways={certificate='a.pem',key='a.key'}", r"gateways: missing ca"),
        (
            "gateways={certificate='a',key='b',ca='c'}",
            r"gateways: needs a store that all of them share: set store\.url",
        ),
        ("gateways={certificate='a',key='b',ca='c',lease='1ms'}", r"gateways: lease is 0\.001; it must be 1 second"),
        ("gateways={certificate='a',key='b',ca='c',settle='1ms'}", r"gateways: settle is 0\.001; it must be 0\.1 sec"),
        ("gateways={certificate='a',key='b',ca='c',elect='etcd'}", r"gateways\.elect: 'etcd'"),
        (
            "gateways={certificate='a',key='b',ca='c',elect='kubernetes',kubernetes_lease='A/b'}",
            r"gateways: kubernetes_lease is 'A/b'; it must be a Kubernetes name",
        ),
        ("relays={hold='0s'}", r"relays: hold is 0\.0; it must be above 0"),
        ("relays={fall_back='never'}", r"relays\.fall_back: "),
        (
            "gateways={certificate='a',key='b',ca='c',advertise='x'}",
            r"gateways: advertise is 'x'; it must be HOST:PORT",
        ),
        (
            "gateways={certificate='a',key='b',ca='c',name='a/b'}",
            r"gateways: name is 'a/b'; it must be 1 to 63 letters",
        ),
        ("fleet.health.health_period=0", r"fleet\.health: health_period_s is 0\.0; it must be above 0"),
        ("telemetry.rotate_keep=-1", r"telemetry: rotate_keep is -1"),
        ("policy=chirron", r"policy: unknown policy 'chirron'; did you mean 'chiron'"),
        ("policy=niyama", r"policy: 'niyama' decides who gets the tokens .* which a gateway's engines let nobody"),
        ("policies.chiron.utilisaton=1", r"policies\.chiron\.utilisaton: unknown key"),
        ("gpus.a100=0", r"gpus\.a100: 0: must be 1 or more"),
        ("gpus.A100=8", r"gpus\.A100: no instance has GPUs of this type; "),
        ("devices=['0','0']", r"devices: .* each device once"),
        ("admin_key_hash=secret", r"admin_key_hash: must be 'sha256:'"),
        ("classes.chat.kind=x", r"classes\.chat\.kind: 'x'; .*allowed: interactive, batch"),
    ],
)
def test_a_mistake_is_refused_with_its_path(change: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse(THREE_LINES, change)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ('name = "a"\nkey = "sk-some-secret"', r"keys\[0\]\.key: unknown key; .*allowed: name, hash"),
        ('name = "a"\nhash = "sk-some-secret"', r"keys\[0\]: key 'a': hash must be 'sha256:'"),
        ('hash = "sk-some-secret"', r"keys\[0\]\.name: None must be text"),
        (f'name = "admin"\nhash = "{HASH}"', r"keys\[0\]\.name: 'admin'"),
        ('name = "a"', r"keys\[0\]\.hash: missing.*chiron key --name a"),
        (f'name = "a"\nhash = "{HASH}"\nmodels = ["x"]', r"keys\[0\]\.models\[0\]: unknown name 'x'"),
        (
            f'name = "a"\nhash = "{HASH}"\n[[keys]]\nname = "b"\nhash = "{HASH}"',
            r"keys\[1\]: has the hash of keys\[0\]",
        ),
        (f'name = "a"\nhash = "{HASH}"\nrequests_per_minute = 0', r"requests_per_minute is 0\.0; it must be above 0"),
    ],
)
def test_bad_keys_are_refused_and_a_secret_put_there_by_mistake_is_not_shown(entry: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        parse(f"{THREE_LINES}\n[[keys]]\n{entry}")
    assert "sk-some-secret" not in str(caught.value)


def test_keys_open_the_way_beyond_loopback_and_stay_out_of_repr() -> None:
    config = parse(f'{THREE_LINES}\n[[keys]]\nname = "team"\nhash = "{HASH}"\n[server]\nhost = "0.0.0.0"')
    assert config.keys[0].requests_per_minute == inf
    assert HASH not in repr(config)
    assert parse(THREE_LINES, "server.host=0.0.0.0", "server.open_without_keys=true").keys == ()


def test_the_key_of_an_endpoint_is_read_from_its_file_and_not_shown(tmp_path: Path) -> None:
    (tmp_path / "engine.key").write_text("very-secret\n")
    (tmp_path / "c.toml").write_text(THREE_LINES + 'api_key_file = "engine.key"\nserved_model_name = "inside"')
    config = load_serve(tmp_path / "c.toml")
    assert config.models[0].kinds[0].api_key == "very-secret"
    assert "very-secret" not in repr(config)


def test_a_password_in_a_url_is_refused_and_not_shown() -> None:
    with pytest.raises(ConfigError, match="api_key_file") as caught:
        parse(THREE_LINES, 'models."llama-3.1-8b".endpoints=["http:' + '//me:very-secret@localhost"]')
    assert "very-secret" not in str(caught.value)


def test_a_policy_brings_its_own_settings_whether_the_file_or_the_caller_names_it() -> None:
    text = 'policy = "mine"\n[policies.mine]\npolicy = "chiron"\nhold = "2m"\n' + THREE_LINES
    mine, other = parse(text), parse(text, policy="llumnix")
    assert mine.policy_settings.hold_s == 120.0
    assert (mine.policy, mine.policy_label) == ("chiron", "mine")
    assert (other.policy, other.policy_label) == ("llumnix", "llumnix")
    with pytest.raises(ConfigError, match=r"--policy: unknown policy 'lumnix'; did you mean 'llumnix'"):
        parse(text, policy="lumnix")


def test_paths_are_relative_to_the_file_and_the_event_log_can_be_off(tmp_path: Path) -> None:
    path = tmp_path / "c.toml"
    path.write_text(THREE_LINES)
    config = load_serve(path, ["server.data=d", "telemetry.event_log=logs/e.jsonl"])
    assert (config.data, config.event_log) == (tmp_path / "d", tmp_path / "logs" / "e.jsonl")
    assert load_serve(path, ["telemetry.event_log=off"]).event_log is None


def test_a_missing_file_says_how_to_get_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"there is no such file; `chiron init .*` writes one"):
        load_serve(tmp_path / "no.toml")


@pytest.mark.parametrize(
    ("text", "size"), [("0", 0), ("1024", 1024), ("32MiB", 32 << 20), ("8 gb", 8 * 10**9), ("1.5KiB", 1536)]
)
def test_sizes_are_read(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "MiB", "-1", "1 MB 2", "1e3", "1PB", "inf"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(SizeError, match="expected a whole number of bytes"):
        parse_size(text)


@pytest.mark.parametrize("engine", list(ENGINES))
def test_the_names_of_engines_are_those_of_the_table(engine: str) -> None:
    config = one(engine, 'endpoints = ["http://127.0.0.1:1"]')
    assert config.models[0].kinds[0].engine == engine


SECTIONS = {
    "server": ServerSettings,
    "limits": LimitSettings,
    "batch": BatchSettings,
    "telemetry": TelemetrySettings,
    "fleet": FleetSettings,
    "fleet.health": HealthSettings,
    "fleet.backoff": BackoffSettings,
    "fleet.recovery": RecoverySettings,
    "store": StoreSettings,
    "relays": StaySettings,
}


def test_a_store_on_postgresql_is_a_url_or_a_table() -> None:
    url = "postgresql://chiron@db:5432/chiron"
    plain = parse(f'store = "{url}"\n' + THREE_LINES).store
    assert plain == PostgresSettings(url=url, retention_s=BatchSettings().retention_s)
    assert url not in repr(plain)
    table = f'[store]\nurl = "{url}"\npassword_file = "secret"\ntls = "verify-full"\n'
    table += 'lease = "10s"\nfile_bytes_max = "1GiB"\n'
    store = parse(THREE_LINES + table + '[batch]\nretention = "1d"').store
    assert isinstance(store, PostgresSettings)
    assert (store.lease_s, store.file_bytes_max, store.retention_s) == (10.0, 1 << 30, 86_400.0)
    assert store.password_file.startswith("/")
    for change, message in (
        ("store.reserve_bytes=1", r"store\.reserve_bytes: is for SQLite"),
        ("store.tls=maybe", r"store\.tls: 'maybe'"),
        ("store.password_env=PASSWORD", "password_env: give it or password_file"),
        ("store.schema='A b'", "schema: 'A b' must be"),
        ("store.lease=0.1s", "lease: 0.1 must be between"),
        ("store.connections_max=0", "connections_max: 0 must be between"),
    ):
        with pytest.raises(ConfigError, match=message):
            parse(THREE_LINES + table, change)


def test_the_written_config_is_nothing_but_defaults() -> None:
    text = template().replace(PLACEHOLDER, THREE_LINES)
    # Every commented key and table is switched on; keys that only show a form are left out.
    lines = [line.removeprefix("# ") for line in text.splitlines() if re.match(r"# (\[|[a-z_]+ = )|[^#]", line)]
    skip = ("[[keys]]", "name = ", "hash = ", "models = ", "classes = []", "requests_per", "tokens_per", "a100 =")
    switched_on = "\n".join(line for line in lines if not line.startswith(skip))
    assert "queue_max = 10000" in switched_on
    assert replace(parse(switched_on), text="") == replace(parse("".join(THREE_LINES) + "max_instances = 1"), text="")


@pytest.mark.parametrize("section", SECTIONS)
def test_the_written_config_shows_every_key(section: str) -> None:
    text = template()
    (table,) = re.findall(rf"^(?:# )?\[{re.escape(section)}\](.*?)(?=^(?:# )?\[|\Z)", text, re.DOTALL | re.MULTILINE)
    own = {"store": {"retention"}, "fleet": {"health", "backoff", "recovery"}}.get(section, set())
    keys = set(re.findall(r"^# ([a-z_]+) = ", table, re.MULTILINE))
    assert keys == set(keys_of(SECTIONS[section])) - own


def ray(*lines: str) -> RaySource:
    source = one(*lines).models[0].kinds[0].source
    assert isinstance(source, RaySource)
    return source


def test_engines_on_ray_need_one_line_and_listen_at_their_nodes_address() -> None:
    source = ray("vllm", 'model_path = "org/name"', "gpus = 4", 'ray = { address = "auto" }')
    assert (source.address, source.namespace, source.nodes, source.on_stop) == ("auto", "chiron", 1, "keep")
    assert source.needs == {"CPU": 1.0, "GPU": 4.0}
    assert source.command[source.command.index("--host") + 1] == "{host}"
    shipped = ray("emulated", 'profile = "llama-3.1-8b/a100/tp1"', "ray = {}")
    assert shipped.command[0] == "{python}", "that of the node"
    assert shipped.command[-2:] == ("--host", "{host}")
    assert shipped.needs == {"CPU": 1.0}
    own = ray(
        "command", 'command = ["serve", "--port", "{port}"]', "ray = { gpus = 0.5, cpus = 0, python = 'x/python' }"
    )
    assert (own.command, own.needs) == (("serve", "--port", "{port}"), {"GPU": 0.5})
    assert own.python == "/nowhere/x/python"
    assert len({each.fingerprint for each in (source, shipped, own)}) == 3


def test_an_instance_on_ray_may_span_nodes_and_ask_for_more_than_gpus() -> None:
    keys = 'nodes = 2, resources = { a100 = 1 }, memory = 8e9, follower_args = ["--headless"], on_stop = "remove"'
    source = ray("vllm", 'model_path = "org/name"', "gpus = 16", f"ray = {{ {keys}, absent_after = '1m' }}")
    assert source.needs == {"a100": 1.0, "CPU": 1.0, "GPU": 8.0, "memory": 8e9}
    assert (source.nodes, source.follower_args, source.absent_after_s) == (2, ("--headless",), 60.0)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ("nodes = 3", "ray.gpus: 16; they must divide into 3 nodes"),
        ("nodes = 0", "nodes is 0; it must be 1 or more"),
        ("gpus = 1.5", "resources: GPU is 1.5; more than one must be whole"),
        ("gpus = 0, cpus = 0", "an instance needs something of a node"),
        ('on_stop = "leave"', "on_stop is 'leave'; it must be one of keep, remove"),
        ('namespace = "a:b"', "namespace is 'a:b'; it must be letters"),
        ('adress = "auto"', "unknown key"),
        ("absent_after = 0", "absent_after is 0"),
    ],
)
def test_what_a_ray_cluster_cannot_do_is_refused(keys: str, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        one("vllm", 'model_path = "org/name"', "gpus = 16", f"ray = {{ {keys} }}")


GATEWAYS = "[store]\nurl = 'postgresql://a@b/c'\n[gateways]\ncertificate = 'a'\nkey = 'b'\nca = 'c'\n"
PROCESS = "command = ['engine', '{port}']"


@pytest.mark.parametrize(
    ("head", "source", "message"),
    [
        (GATEWAYS, f"{PROCESS}\nray = {{ on_stop = 'remove' }}", "says ray.on_stop = 'remove', and a gateway"),
        (GATEWAYS, PROCESS, "is started by the gateway that leads, where others cannot reach it"),
        ("[kubernetes]\n", PROCESS, "would be started again with each change of a ChironModel"),
    ],
)
def test_what_could_not_be_handed_over_is_refused_where_gateways_do(head: str, source: str, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        parse_serve(f"{head}[models.m]\nengine = 'openai'\n{source}\n", directory=Path())


def test_engines_on_ray_are_nothing_else() -> None:
    with pytest.raises(ConfigError, match=r"give ray .* or endpoints or kubernetes, not two of them"):
        one("vllm", 'endpoints = ["http://127.0.0.1:1"]', "ray = {}")
