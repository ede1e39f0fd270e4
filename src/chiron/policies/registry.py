"""Every policy by name. A new one is a file beside the others and a line here."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from chiron.policies.chiron.global_loop import make_chiron
from chiron.policies.chiron.paper import ChironPaperSettings, make_chiron_paper
from chiron.policies.chiron.settings import ChironSettings
from chiron.policies.policy import Policy, PolicyEntry
from chiron.policies.rivals.scalers.aibrix import AibrixKpaSettings, AibrixSettings, make_aibrix, make_aibrix_kpa
from chiron.policies.rivals.scalers.aibrix_optimizer import AibrixOptimizerSettings, make_aibrix_optimizer
from chiron.policies.rivals.scalers.autothrottle import AutothrottleSettings, make_autothrottle
from chiron.policies.rivals.scalers.dynamo import DynamoSettings, make_dynamo
from chiron.policies.rivals.scalers.dynamo_batch import DynamoBatchSettings, make_dynamo_batch
from chiron.policies.rivals.scalers.dynamollm import DynamoLlmSettings, make_dynamollm
from chiron.policies.rivals.scalers.forecast import ForecastHoltWintersSettings, ForecastSettings, make_forecast
from chiron.policies.rivals.scalers.forecast_lstm import LstmSettings, make_forecast_lstm
from chiron.policies.rivals.scalers.hpa import HpaKvSettings, HpaSettings, make_hpa
from chiron.policies.rivals.scalers.keda import KedaSettings, make_keda
from chiron.policies.rivals.scalers.knative import KnativeSettings, make_knative
from chiron.policies.rivals.scalers.llmd import LlmdSloSettings, make_llmd_slo
from chiron.policies.rivals.scalers.ray_serve import RayServeSettings, make_ray_serve
from chiron.policies.rivals.scalers.sageserve import SageServeSettings, make_sageserve
from chiron.policies.rivals.scalers.skyserve import SkyServeSettings, make_skyserve
from chiron.policies.rivals.scalers.static import StaticSettings, make_static
from chiron.policies.rivals.scalers.wva import WvaSettings, WvaTokensSettings, make_wva
from chiron.policies.rivals.scalers.wva_queueing import WvaQueueingSettings, make_wva_queueing
from chiron.policies.rivals.schedulers.accelgen import AccelGenSettings, make_accelgen
from chiron.policies.rivals.schedulers.alise import AliseSettings, make_alise
from chiron.policies.rivals.schedulers.autellix import AutellixSettings, make_autellix
from chiron.policies.rivals.schedulers.jitserve import JitServeSettings, TempoSettings, make_jitserve
from chiron.policies.rivals.schedulers.llumnix import LlumnixSettings, make_llumnix
from chiron.policies.rivals.schedulers.niyama import NiyamaSettings, make_niyama
from chiron.policies.rivals.schedulers.ooco import OocoSettings, make_ooco
from chiron.policies.rivals.schedulers.polyserve import PolyServeSettings, make_polyserve
from chiron.policies.rivals.schedulers.qlm import QlmSettings, make_qlm
from chiron.policies.rivals.schedulers.sarathi import SarathiSettings, make_sarathi
from chiron.policies.rivals.schedulers.slos_serve import SlosServeSettings, make_slos_serve
from chiron.policies.rivals.tuned_settings import TUNED_SETTINGS

_AS_PUBLISHED: dict[str, PolicyEntry] = {
    "chiron": PolicyEntry(
        settings=ChironSettings,
        make=make_chiron,
        about="ours: learned batch sizes, forecast fleet, batch planned by deadline into spare capacity",
    ),
    "chiron-paper": PolicyEntry(
        settings=ChironPaperSettings,
        make=make_chiron_paper,
        about="the published design as far as it is public: step-wise batch sizes, three pools, IBP and BBP",
    ),
    "llumnix": PolicyEntry(
        settings=LlumnixSettings,
        make=make_llumnix,
        about="Llumnix (OSDI '24): dispatch, migration and scaling by free KV per request",
    ),
    "hpa-queue": PolicyEntry(
        settings=HpaSettings,
        make=make_hpa,
        about="Kubernetes HPA on waiting requests per engine, least outstanding requests first",
    ),
    "hpa-kv": PolicyEntry(
        settings=HpaKvSettings,
        make=make_hpa,
        about="Kubernetes HPA on the share of KV in use, least outstanding requests first",
    ),
    "knative-kpa": PolicyEntry(
        settings=KnativeSettings,
        make=make_knative,
        about="Knative's autoscaler on requests in flight, with its panic mode",
    ),
    "keda-hpa": PolicyEntry(
        settings=KedaSettings,
        make=make_keda,
        about="KEDA with an HPA on waiting and running requests, as llm-d's guide sets it up",
    ),
    "llm-d-slo": PolicyEntry(
        settings=LlmdSloSettings,
        make=make_llmd_slo,
        about="llm-d's scaling on latency over SLO, a KEDA formula followed by an HPA",
    ),
    "ray-serve": PolicyEntry(
        settings=RayServeSettings,
        make=make_ray_serve,
        about="Ray Serve on ongoing requests per replica, power of two choices",
    ),
    "aibrix-apa": PolicyEntry(
        settings=AibrixSettings,
        make=make_aibrix,
        about="AIBrix's autoscaler on the share of KV in use and on waiting requests",
    ),
    "aibrix-kpa": PolicyEntry(
        settings=AibrixKpaSettings,
        make=make_aibrix_kpa,
        about="AIBrix's autoscaler after Knative's, on the share of KV in use, with a panic mode",
    ),
    "aibrix-optimizer": PolicyEntry(
        settings=AibrixOptimizerSettings,
        make=make_aibrix_optimizer,
        about="AIBrix's GPU optimizer: load by patterns of lengths over what an instance does, followed after Knative",
    ),
    "wva-saturation": PolicyEntry(
        settings=WvaSettings,
        make=make_wva,
        about="llm-d's Workload Variant Autoscaler by spare KV and queue (V1), followed by an HPA",
    ),
    "wva-tokens": PolicyEntry(
        settings=WvaTokensSettings,
        make=make_wva,
        about="llm-d's Workload Variant Autoscaler by tokens of KV (V2), followed by an HPA",
    ),
    "wva-queueing": PolicyEntry(
        settings=WvaQueueingSettings,
        make=make_wva_queueing,
        about="llm-d's Workload Variant Autoscaler by a queueing model and SLOs, followed by an HPA",
    ),
    "dynamo-planner": PolicyEntry(
        settings=DynamoSettings,
        make=make_dynamo,
        about="NVIDIA Dynamo's SLA planner: a forecast every three minutes over what an engine does within the SLA",
    ),
    "dynamo-batch": PolicyEntry(
        settings=DynamoBatchSettings,
        make=make_dynamo_batch,
        about="dynamo-planner with Dynamo's batch scheduling: held, drained into what is spare, sized by deadlines",
    ),
    "forecast-arima": PolicyEntry(
        settings=ForecastSettings,
        make=make_forecast,
        about="a fleet for the load that ARIMA expects by the time an instance is up",
    ),
    "forecast-holt-winters": PolicyEntry(
        settings=ForecastHoltWintersSettings,
        make=make_forecast,
        about="a fleet for the load that Holt-Winters' smoothing expects by the time an instance is up",
    ),
    "forecast-lstm": PolicyEntry(
        settings=LstmSettings,
        make=make_forecast_lstm,
        about="a fleet for the load that a small LSTM expects by the time an instance is up; needs torch (extra lstm)",
    ),
    "sageserve": PolicyEntry(
        settings=SageServeSettings,
        make=make_sageserve,
        about="SageServe's LT-UA (2025): an hourly plan by ARIMA, carried out by the share of KV in use",
    ),
    "dynamollm": PolicyEntry(
        settings=DynamoLlmSettings,
        make=make_dynamollm,
        about="DynamoLLM (HPCA '25) without its energy knobs: pools by request length, a fleet for half an hour each",
    ),
    "skyserve": PolicyEntry(
        settings=SkyServeSettings,
        make=make_skyserve,
        about="SkyPilot's SkyServe on requests a second, after minutes of delay",
    ),
    "qlm": PolicyEntry(
        settings=QlmSettings,
        make=make_qlm,
        about="QLM (SoCC '24): a fixed fleet that pulls request groups, earliest deadline first, and evicts batch work",
    ),
    "polyserve": PolicyEntry(
        settings=PolyServeSettings,
        make=make_polyserve,
        about="PolyServe (2025): a fixed fleet in bins by ITL SLO, filled where load is highest and SLOs are kept",
    ),
    "sarathi": PolicyEntry(
        settings=SarathiSettings,
        make=make_sarathi,
        about="Sarathi-Serve (OSDI '24): a fixed fleet whose steps take prompts in chunks, first come, first served",
    ),
    "niyama": PolicyEntry(
        settings=NiyamaSettings,
        make=make_niyama,
        about="Niyama (ASPLOS '26): a fixed fleet that prefills by deadline and length, in chunks that fit them",
    ),
    "autellix": PolicyEntry(
        settings=AutellixSettings,
        make=make_autellix,
        about="Autellix (2025): a fixed fleet that serves calls by what their programs have had; needs programs",
    ),
    "autothrottle": PolicyEntry(
        settings=AutothrottleSettings,
        make=make_autothrottle,
        about="Autothrottle (NSDI '24) on the max batch size of a fixed fleet: Captains with a bandit above them",
    ),
    "alise-like": PolicyEntry(
        settings=AliseSettings,
        make=make_alise,
        about="after ALISE (2024): a fixed fleet, least time left first, by true lengths with an error (only here)",
    ),
    "ooco-like": PolicyEntry(
        settings=OocoSettings,
        make=make_ooco,
        about="after OOCO (2025): a fixed fleet in a latency-strict and a relaxed pool, with batch work in either",
    ),
    "accelgen": PolicyEntry(
        settings=AccelGenSettings,
        make=make_accelgen,
        about="AccelGen (2025): a fixed fleet whose steps are sized by the tightest ITL SLO, filled by slack and KV",
    ),
    "jitserve": PolicyEntry(
        settings=JitServeSettings,
        make=make_jitserve,
        about="JITServe (NSDI '26): a fixed fleet that runs, frame by frame, the groups that bring most for their time",
    ),
    "tempo": PolicyEntry(
        settings=TempoSettings,
        make=make_jitserve,
        about="Tempo (2025): a fixed fleet that runs, frame by frame, what brings most for its time",
    ),
    "slos-serve": PolicyEntry(
        settings=SlosServeSettings,
        make=make_slos_serve,
        about="SLOs-Serve (2025): a fixed fleet that plans whom it can serve in time, the rest as best effort",
    ),
    "static": PolicyEntry(
        settings=StaticSettings,
        make=make_static,
        about="a fixed fleet, least outstanding requests first",
    ),
}


def _with_tuned() -> Iterator[tuple[str, PolicyEntry]]:
    """Each policy, and behind it the same with the settings that the fair tuning found."""
    for name, entry in _AS_PUBLISHED.items():
        yield name, entry
        if name in TUNED_SETTINGS:
            about = f"{name} with the settings that the fair tuning found"
            yield f"{name}-tuned", replace(entry, settings=TUNED_SETTINGS[name], about=about)


POLICIES: dict[str, PolicyEntry] = dict(_with_tuned())


def make_policy(name: str, settings: Any = None) -> Policy:
    """The policy under these settings (its defaults if None). Raises KeyError with the names that exist."""
    entry = POLICIES.get(name)
    if entry is None:
        raise KeyError(f"unknown policy {name!r}; there are: {', '.join(sorted(POLICIES))}")
    return entry.make(entry.settings() if settings is None else settings)
