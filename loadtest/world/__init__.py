"""A simulated live-commerce platform: seeded, on its own clock, with the truth beside what it tells.

    world = World(WorldSettings(seed=7, target_live=300))
    events = world.step()                  # columns; events.to_batches() for a server
    world.truth.is_live(events.stream, world.now_ms)

settings → population, titles → streams (columns) → lifecycle, audience, actions → delivery → events, wire.
Who asks a server for slates answers them with `loadtest.world.feedback`: impressions, and what follows by `Viewing`.
"""

from loadtest.world.events import END_REASONS, REPORT_REASONS, EventKind, WorldEvents, viewer_name
from loadtest.world.population import Viewer
from loadtest.world.settings import CATEGORIES, MARKETS, Adversity, Category, Market, WorldSettings
from loadtest.world.streams import NEVER, Flaw, State, StreamColumns
from loadtest.world.truth import EndEvents, MediaSpans, Truth
from loadtest.world.viewing import EXAMINATION_EXPONENT, Responses, Viewing, examination
from loadtest.world.world import World

__all__ = [
    "CATEGORIES",
    "END_REASONS",
    "EXAMINATION_EXPONENT",
    "MARKETS",
    "NEVER",
    "REPORT_REASONS",
    "Adversity",
    "Category",
    "EndEvents",
    "EventKind",
    "Flaw",
    "Market",
    "MediaSpans",
    "Responses",
    "State",
    "StreamColumns",
    "Truth",
    "Viewer",
    "Viewing",
    "World",
    "WorldEvents",
    "WorldSettings",
    "examination",
    "viewer_name",
]
