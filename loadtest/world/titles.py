"""Readable, varied stream titles from word lists, some of them in other scripts."""

from __future__ import annotations

import numpy as np

# Language to (adjectives, formats); nouns belong to the category. A title is "adjective noun format #n".
_PHRASES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "en": (
        ("Vintage", "Rare", "Budget", "Premium", "Handmade", "Late-night", "Weekend", "Limited", "Mystery"),
        ("live auction", "flash sale", "try-on", "unboxing", "giveaway", "drop", "haul", "Q&A", "$1 starts"),
    ),
    "de": (
        ("Schöne", "Seltene", "Günstige", "Neue", "Handgemachte", "Limitierte"),
        ("live", "Auktion", "Ausverkauf", "im Test", "Verlosung", "für Anfänger"),
    ),
    "fr": (
        ("Belles", "Rares", "Nouvelles", "Éditions limitées :", "Pépites :"),
        ("en direct", "aux enchères", "vente flash", "déballage", "à prix cassé"),
    ),
    "es": (
        ("Increíbles", "Raras", "Nuevas", "Edición limitada:", "Mañana no hay:"),
        ("en vivo", "subasta", "oferta relámpago", "sorteo", "desde 1 €"),
    ),
    "ja": (
        ("限定", "激レア", "新作", "お得な", "深夜の"),
        ("ライブ", "オークション", "タイムセール", "開封", "プレゼント企画"),
    ),
    "id": (
        ("Murah", "Langka", "Baru", "Spesial", "Diskon"),
        ("live", "lelang", "flash sale", "bagi-bagi hadiah", "cuci gudang"),
    ),
}
_NOUNS: dict[str, tuple[str, ...]] = {
    "fashion": ("denim", "summer dresses", "streetwear", "coats", "handbags", "kimono", "batik"),
    "beauty": ("lipstick", "K-beauty", "skincare", "nail art", "perfume", "crème de nuit"),
    "electronics": ("headphones", "retro consoles", "phones", "drones", "mechanical keyboards", "cameras"),
    "collectibles": ("Pokémon cards", "comics", "coins", "stamps", "figures", "sports cards"),
    "jewellery": ("gold rings", "pearls", "watches", "silver", "gemstones"),
    "sneakers": ("sneakers", "retro runners", "deadstock pairs", "basketball shoes"),
    "home": ("ceramics", "lamps", "rugs", "kitchen knives", "houseplants", "tatami"),
    "food": ("noodles", "cheese", "hot sauce", "jalapeño snacks", "fresh seafood", "chocolate"),
    "wine": ("Bordeaux", "natural wine", "sake", "whisky", "Rosé"),
    "music": ("vinyl", "acoustic set", "piano", "DJ session", "karaoke"),
}
_DECORATIONS = ("✨ ", "🔥 ", "★ ", "🎁 ")


def title(category: str, language: str, rng: np.random.Generator) -> str:
    """One title, below 256 bytes of UTF-8; other categories name themselves, other languages use English."""
    adjectives, formats = _PHRASES.get(language, _PHRASES["en"])
    nouns = _NOUNS.get(category, (category,))
    draw = rng.random(5)

    def pick(words: tuple[str, ...], u: float) -> str:
        return words[int(u * len(words))]

    words = pick(adjectives, draw[0]), pick(nouns, draw[1]), pick(formats, draw[2])
    text = f"{' '.join(words)} #{1 + int(draw[3] * 99)}"
    return pick(_DECORATIONS, draw[4] * 10) + text if draw[4] < 0.1 else text
