"""Little stories: a hero, an object, and one of a few plots."""

import random

from recipes.pocket.facts import World


def tell_story(world: World, rng: random.Random, hero: str, thing: str) -> str:
    """A story about the person `hero` and the object `thing`; the friend in it makes no held-out pair with `thing`."""
    texts = world.texts["stories"]
    friend = hero
    while friend == hero or (friend, thing) in world.held_out_heroes:
        friend = rng.choice(world.people)
    cast = {"h": hero, "f": friend, "o": thing, "p": rng.choice(texts["places"])}
    sentences = [texts["openings"], *rng.choice(texts["plots"])]
    return world.join(rng.choice(wordings).format(**cast) for wordings in sentences)
