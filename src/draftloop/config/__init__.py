"""The configuration: one frozen tree of settings, built once at the edge.

Contract: `load_config` layers files and `--set` overrides over the built-in defaults and refuses whatever
is unknown, mistyped, out of range or contradictory. Must not know models, backends or the command line.

Where to look: `schema.py` holds every setting with its default and range, `source.py` reads YAML and keeps
the line of each value, `load.py` layers, validates and words the errors.
"""

from draftloop.config.load import LoadedConfig, load_config
from draftloop.config.schema import Config, flatten
from draftloop.config.source import Origin, OriginKind

__all__ = ["Config", "LoadedConfig", "Origin", "OriginKind", "flatten", "load_config"]
