"""Scenarios: what a bug of a driver, of an SMMU or of a device looks like to a guest, one TOML file each.

`library/` has the files; `scenario` reads them, `runner` runs them, `expectation` judges.
"""

from viommu.scenarios.expectation import Expectation
from viommu.scenarios.runner import Outcome, Runner
from viommu.scenarios.scenario import Scenario, ScenarioError, load_all

__all__ = ["Expectation", "Outcome", "Runner", "Scenario", "ScenarioError", "load_all"]
