"""Settings of rivals whose defaults are what the fair tuning found.

Each has a name in this module, so that a run can be sent to another process.
"""

from __future__ import annotations

from typing import Any

from chiron.policies.chiron.paper import ChironPaperSettings
from chiron.policies.ranges import with_defaults
from chiron.policies.rivals.scalers.aibrix import AibrixKpaSettings, AibrixSettings
from chiron.policies.rivals.scalers.aibrix_optimizer import AibrixOptimizerSettings
from chiron.policies.rivals.scalers.autothrottle import AutothrottleSettings
from chiron.policies.rivals.scalers.dynamo import DynamoSettings
from chiron.policies.rivals.scalers.dynamo_batch import DynamoBatchSettings
from chiron.policies.rivals.scalers.dynamollm import DynamoLlmSettings
from chiron.policies.rivals.scalers.forecast import ForecastHoltWintersSettings, ForecastSettings
from chiron.policies.rivals.scalers.forecast_lstm import LstmSettings
from chiron.policies.rivals.scalers.hpa import HpaKvSettings, HpaSettings
from chiron.policies.rivals.scalers.keda import KedaSettings
from chiron.policies.rivals.scalers.knative import KnativeSettings
from chiron.policies.rivals.scalers.llmd import LlmdSloSettings
from chiron.policies.rivals.scalers.ray_serve import RayServeSettings
from chiron.policies.rivals.scalers.sageserve import SageServeSettings
from chiron.policies.rivals.scalers.skyserve import SkyServeSettings
from chiron.policies.rivals.scalers.wva import WvaSettings, WvaTokensSettings
from chiron.policies.rivals.scalers.wva_queueing import WvaQueueingSettings
from chiron.policies.rivals.schedulers.accelgen import AccelGenSettings
from chiron.policies.rivals.schedulers.alise import AliseSettings
from chiron.policies.rivals.schedulers.autellix import AutellixSettings
from chiron.policies.rivals.schedulers.jitserve import JitServeSettings, TempoSettings
from chiron.policies.rivals.schedulers.llumnix import LlumnixSettings
from chiron.policies.rivals.schedulers.niyama import NiyamaSettings
from chiron.policies.rivals.schedulers.ooco import OocoSettings
from chiron.policies.rivals.schedulers.polyserve import PolyServeSettings
from chiron.policies.rivals.schedulers.qlm import QlmSettings
from chiron.policies.rivals.schedulers.sarathi import SarathiSettings
from chiron.policies.rivals.schedulers.slos_serve import SlosServeSettings
from chiron.policies.rivals.tuned import TUNED

ChironPaperTuned = with_defaults(ChironPaperSettings, "ChironPaperTuned", __name__, TUNED.get("chiron-paper", {}))
LlumnixTuned = with_defaults(LlumnixSettings, "LlumnixTuned", __name__, TUNED.get("llumnix", {}))
HpaQueueTuned = with_defaults(HpaSettings, "HpaQueueTuned", __name__, TUNED.get("hpa-queue", {}))
HpaKvTuned = with_defaults(HpaKvSettings, "HpaKvTuned", __name__, TUNED.get("hpa-kv", {}))
KnativeTuned = with_defaults(KnativeSettings, "KnativeTuned", __name__, TUNED.get("knative-kpa", {}))
KedaTuned = with_defaults(KedaSettings, "KedaTuned", __name__, TUNED.get("keda-hpa", {}))
LlmdSloTuned = with_defaults(LlmdSloSettings, "LlmdSloTuned", __name__, TUNED.get("llm-d-slo", {}))
RayServeTuned = with_defaults(RayServeSettings, "RayServeTuned", __name__, TUNED.get("ray-serve", {}))
AibrixTuned = with_defaults(AibrixSettings, "AibrixTuned", __name__, TUNED.get("aibrix-apa", {}))
AibrixKpaTuned = with_defaults(AibrixKpaSettings, "AibrixKpaTuned", __name__, TUNED.get("aibrix-kpa", {}))
WvaTuned = with_defaults(WvaSettings, "WvaTuned", __name__, TUNED.get("wva-saturation", {}))
WvaTokensTuned = with_defaults(WvaTokensSettings, "WvaTokensTuned", __name__, TUNED.get("wva-tokens", {}))
WvaQueueingTuned = with_defaults(WvaQueueingSettings, "WvaQueueingTuned", __name__, TUNED.get("wva-queueing", {}))
DynamoTuned = with_defaults(DynamoSettings, "DynamoTuned", __name__, TUNED.get("dynamo-planner", {}))
ForecastArimaTuned = with_defaults(ForecastSettings, "ForecastArimaTuned", __name__, TUNED.get("forecast-arima", {}))
ForecastHoltWintersTuned = with_defaults(
    ForecastHoltWintersSettings, "ForecastHoltWintersTuned", __name__, TUNED.get("forecast-holt-winters", {})
)
SkyServeTuned = with_defaults(SkyServeSettings, "SkyServeTuned", __name__, TUNED.get("skyserve", {}))
SageServeTuned = with_defaults(SageServeSettings, "SageServeTuned", __name__, TUNED.get("sageserve", {}))
QlmTuned = with_defaults(QlmSettings, "QlmTuned", __name__, TUNED.get("qlm", {}))
PolyServeTuned = with_defaults(PolyServeSettings, "PolyServeTuned", __name__, TUNED.get("polyserve", {}))
SarathiTuned = with_defaults(SarathiSettings, "SarathiTuned", __name__, TUNED.get("sarathi", {}))
NiyamaTuned = with_defaults(NiyamaSettings, "NiyamaTuned", __name__, TUNED.get("niyama", {}))
AibrixOptimizerTuned = with_defaults(
    AibrixOptimizerSettings, "AibrixOptimizerTuned", __name__, TUNED.get("aibrix-optimizer", {})
)
DynamoBatchTuned = with_defaults(DynamoBatchSettings, "DynamoBatchTuned", __name__, TUNED.get("dynamo-batch", {}))
ForecastLstmTuned = with_defaults(LstmSettings, "ForecastLstmTuned", __name__, TUNED.get("forecast-lstm", {}))
DynamoLlmTuned = with_defaults(DynamoLlmSettings, "DynamoLlmTuned", __name__, TUNED.get("dynamollm", {}))
AutothrottleTuned = with_defaults(AutothrottleSettings, "AutothrottleTuned", __name__, TUNED.get("autothrottle", {}))
AutellixTuned = with_defaults(AutellixSettings, "AutellixTuned", __name__, TUNED.get("autellix", {}))
AliseTuned = with_defaults(AliseSettings, "AliseTuned", __name__, TUNED.get("alise-like", {}))
AccelGenTuned = with_defaults(AccelGenSettings, "AccelGenTuned", __name__, TUNED.get("accelgen", {}))
JitServeTuned = with_defaults(JitServeSettings, "JitServeTuned", __name__, TUNED.get("jitserve", {}))
TempoTuned = with_defaults(TempoSettings, "TempoTuned", __name__, TUNED.get("tempo", {}))
SlosServeTuned = with_defaults(SlosServeSettings, "SlosServeTuned", __name__, TUNED.get("slos-serve", {}))
OocoTuned = with_defaults(OocoSettings, "OocoTuned", __name__, TUNED.get("ooco-like", {}))

TUNABLE: dict[str, type[Any]] = {
    "chiron-paper": ChironPaperTuned,
    "llumnix": LlumnixTuned,
    "hpa-queue": HpaQueueTuned,
    "hpa-kv": HpaKvTuned,
    "knative-kpa": KnativeTuned,
    "keda-hpa": KedaTuned,
    "llm-d-slo": LlmdSloTuned,
    "ray-serve": RayServeTuned,
    "aibrix-apa": AibrixTuned,
    "aibrix-kpa": AibrixKpaTuned,
    "wva-saturation": WvaTuned,
    "wva-tokens": WvaTokensTuned,
    "wva-queueing": WvaQueueingTuned,
    "dynamo-planner": DynamoTuned,
    "forecast-arima": ForecastArimaTuned,
    "forecast-holt-winters": ForecastHoltWintersTuned,
    "skyserve": SkyServeTuned,
    "sageserve": SageServeTuned,
    "qlm": QlmTuned,
    "polyserve": PolyServeTuned,
    "sarathi": SarathiTuned,
    "niyama": NiyamaTuned,
    "aibrix-optimizer": AibrixOptimizerTuned,
    "dynamo-batch": DynamoBatchTuned,
    "forecast-lstm": ForecastLstmTuned,
    "dynamollm": DynamoLlmTuned,
    "autothrottle": AutothrottleTuned,
    "autellix": AutellixTuned,
    "alise-like": AliseTuned,
    "accelgen": AccelGenTuned,
    "jitserve": JitServeTuned,
    "tempo": TempoTuned,
    "slos-serve": SlosServeTuned,
    "ooco-like": OocoTuned,
}
"""By policy: every rival that has settings with a range."""

TUNED_SETTINGS = {name: settings for name, settings in TUNABLE.items() if name in TUNED}
"""Of those that were tuned."""
