"""A real knowledge graph: facts that Freebase holds about the films of MovieLens."""

from __future__ import annotations

import random
import zipfile
from collections.abc import Iterator

import pandas as pd

from midstream.assets import Card, Package, fetch, size_in_words
from midstream.data.dataset import Source, kept, split_by_text
from midstream.data.graphs import Graph, Key, invented_names, with_names

RECBOLE = Package(
    name="recbole",
    version="1.2.1",
    filename="recbole-1.2.1-py3-none-any.whl",
    sha256="9c9948202011f37eb0a7c6768129313f00d6403ad221ec940d5e2d5d5f33a407",
    size=2_130_151,
)
RELATIONS = {
    "film.film.prequel": "prequel",
    "film.film.directed_by": "director",
    "film.film.written_by": "writer",
    "film.film.produced_by": "producer",
    "film.film.cinematography": "cinematographer",
    "film.film.production_companies": "studio",
    "film.film.subjects": "subject",
    "film.film.rating": "rating",
}
"""Freebase's relations that lead from a film, and the names they have here."""
SERIES = 3
"""Films that a series has at least, so that questions of three hops can be asked about it."""


def film_facts() -> pd.DataFrame:
    """Facts about films, one a row; a film without exactly one object of a relation is left out of that relation.

    Columns: `text` (film, relation and object), `film`, `relation`, `object` (Freebase's identifiers, such as
    m.0ddjy), and `label`, the index of the relation in `RELATIONS`.
    """
    with (
        zipfile.ZipFile(fetch(RECBOLE)) as wheel,
        wheel.open("recbole/dataset_example/ml-100k/ml-100k.kg") as file,
    ):
        facts = pd.read_csv(file, sep="\t", names=["film", "relation", "object"], header=0)
    facts = facts.drop_duplicates()
    facts["relation"] = facts["relation"].map(RELATIONS)
    facts = facts.dropna().drop_duplicates(["film", "relation"], keep=False)
    names = list(RELATIONS.values())
    text = facts["film"] + " " + facts["relation"] + " " + facts["object"]
    return split_by_text(facts.assign(text=text, label=facts["relation"].map(names.index)))


def film_graph(entities: int, seed: int) -> Graph:
    """Series of films drawn at random with all facts about them, at most `entities` films and objects in all.

    The facts are those of `film_facts`, the names are invented. Raises `ValueError` where not one series fits.
    """
    rng = random.Random(seed)
    about: dict[str, dict[str, str]] = {}
    for row in _rows().itertuples():
        about.setdefault(str(row.film), {})[str(row.relation)] = str(row.object)
    all_series = sorted(_series({film: facts["prequel"] for film, facts in about.items() if "prequel" in facts}))
    rng.shuffle(all_series)
    chosen: list[str] = []
    met: dict[str, int] = {}  # in the order in which they are met
    for series in all_series:
        reached = [thing for film in series for thing in (film, *about.get(film, {}).values())]
        if len(met | dict.fromkeys(reached, 0)) <= entities:
            chosen += series
            for thing in reached:
                met.setdefault(thing, len(met))
    if not chosen:
        raise ValueError(f"No series of films has at most {entities} films and objects in all.")
    relations = tuple(RELATIONS.values())
    facts = {
        Key(met[film], relations.index(relation)): met[thing]
        for film in chosen
        for relation, thing in about.get(film, {}).items()
    }
    return with_names(invented_names(len(met), rng), relations, facts, asks="What")


def _series(prequels: dict[str, str]) -> Iterator[list[str]]:
    """Films that prequels join, in series of at least `SERIES`, each sorted."""
    import networkx

    graph = networkx.Graph(prequels.items())
    yield from (sorted(found) for found in networkx.connected_components(graph) if len(found) >= SERIES)


def _rows() -> pd.DataFrame:
    return kept("films", film_facts, RECBOLE.sha256)


FILMS = Source(
    card=Card(
        title="Facts about films",
        what=(
            "Freebase's facts about the films of MovieLens that have one object: prequel, director, writer, producer, "
            "cinematographer, studio, subject, rating; the label is the relation."
        ),
        source="PyPI package recbole 1.2.1 (MovieLens 100K with Freebase, joined by KB4Rec)",
        licence="MIT (package); the data of Freebase are CC BY; MovieLens' terms: research, no redistribution",
        size=f"{size_in_words(RECBOLE.size)} to fetch",
        sha256=RECBOLE.sha256,
        note=(
            "Entities are identifiers without names. The package's table from films to identifiers numbers films as "
            "MovieLens 1M does, not as the 100K beside it, and would give them wrong titles; it is not used."
        ),
    ),
    rows=_rows,
    labels=lambda: tuple(RELATIONS.values()),
    revision=lambda: RECBOLE.sha256,
)
