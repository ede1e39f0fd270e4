"""Scenario files: read strictly, and made into runs."""

from chiron.config.build import setups
from chiron.config.read import ConfigError
from chiron.config.scenario import Scenario, load_scenario, scenario_files

__all__ = ["ConfigError", "Scenario", "load_scenario", "scenario_files", "setups"]
