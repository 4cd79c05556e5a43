"""TRL's trainers on prefkern's head (`patch`), and its collators on the Rust core (`collators`)."""

from prefkern.integrations.trl.patching import MissingDependency, Patch, patch, unpatch

__all__ = ["MissingDependency", "Patch", "patch", "unpatch"]
