"""Short stories with a hero, an object and one of a few plots."""

import random

from recipes.pocket.facts import World

FOREIGN = 0.35  # fraction of training stories with a hero, and with an object, from outside the world


def tell_story(world: World, rng: random.Random, hero: str, thing: str) -> str:
    """A story about the person `hero` and the object `thing`, whose friend forms no held-out pair with `thing`."""
    texts = world.texts["stories"]
    friend = hero
    while friend == hero or (friend, thing) in world.held_out_heroes:
        friend = rng.choice(world.people)
    cast = {"h": hero, "f": friend, "o": thing, "p": rng.choice(texts["places"])}
    sentences = [texts["openings"], *rng.choice(texts["plots"])]
    return world.join(rng.choice(wordings).format(**cast) for wordings in sentences)


def draw_hero(world: World, rng: random.Random, held_out: bool) -> tuple[str, str]:
    """A hero and an object: a held-out pair, or a training pair, sometimes from outside the world."""
    hero, thing = rng.choice(world.heroes[held_out])
    if held_out:
        return hero, thing
    hero = world.stranger(rng, held_out) if rng.random() < FOREIGN else hero
    thing = rng.choice(world.texts["foreign_objects"]) if rng.random() < FOREIGN else thing
    return hero, thing
