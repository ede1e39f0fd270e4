"""Makes the plain manifests of ``data/deploy/kubernetes`` from the Helm chart, with the chart's own values.

Needs helm-python-sdk (the ``dev`` extra): Helm's own renderer, without a cluster.

    .venv/bin/python tools/render_manifests.py
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

DEPLOY = Path(__file__).resolve().parent.parent / "src" / "chiron" / "data" / "deploy"
CHART = DEPLOY / "helm" / "chiron"
FILES = {
    "chiron.yaml": (
        "# Chiron in front of a Deployment of vLLM, in the namespace that it is applied to. Change image, model and\n"
        "# Deployment. docs/kubernetes.md explains it. Check with `kubectl apply --dry-run=server -f chiron.yaml`.\n"
        "# Made from the Helm chart beside it by tools/render_manifests.py.\n",
        ("rbac", "config", "gateway"),
    ),
    "vllm.yaml": ("", ("engine",)),
}
CRDS = CHART / "crds"


def render(values: dict[str, Any], *, name: str = "chiron", namespace: str = "default") -> dict[str, str]:
    """Every template that makes something, by its name."""
    import helm_python

    with helm_python.Chart.load(str(CHART)) as chart:
        made = chart.render(values, name=name, namespace=namespace)
    return {Path(path).stem: text.strip() + "\n" for path, text in made.items() if text.strip()}


def plain() -> dict[str, str]:
    """The manifests by name of the file."""
    made = render({"engine": {"enabled": True}, "storage": {"keep": False}})
    files = {name: head + "---\n".join(made[part] for part in parts) for name, (head, parts) in FILES.items()}
    return files | {path.name: path.read_text() for path in sorted(CRDS.iterdir())}


if __name__ == "__main__":
    for name, text in plain().items():
        (DEPLOY / "kubernetes" / name).write_text(text)
