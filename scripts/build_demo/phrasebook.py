"""Hand-written parts of reviews: sentences put together from them, so that every prompt has plain continuations."""

import random

from .seeds import ASPECTS, PLURAL_ASPECTS

ADJECTIVES = {
    "positive": (
        "great", "wonderful", "fantastic", "excellent", "beautiful", "brilliant", "lovely", "superb", "perfect",
        "amazing", "delightful", "very good", "really good", "fresh and funny", "smart and funny", "warm and charming",
        "clever", "impressive", "a joy to watch", "better than I expected", "the best part of the movie",
        "full of heart", "a pleasant surprise", "worth the price of the ticket", "one of the best things about it",
    ),
    "negative": (
        "terrible", "awful", "horrible", "bad", "boring", "dull", "weak", "poor", "stupid", "ugly", "annoying",
        "a mess", "a disaster", "a waste of time", "very bad", "really bad", "painful to watch", "slow and boring",
        "dumb and lazy", "cheap and ugly", "worse than I expected", "the worst part of the movie", "a failure",
        "a big disappointment", "one of the worst things about it",
    ),
    "neutral": (
        "all right", "nothing new", "what you would expect", "the same as in the first film", "hard to describe",
        "about average", "not what I expected", "different from the book", "simple", "quiet and slow", "long",
        "neither good nor bad", "easy to follow", "a little strange", "like something from another time",
    ),
}  # fmt: skip
TAILS = {
    "positive": (
        "I loved every minute of it", "I would happily watch it again", "I left the theater with a smile",
        "the cast is excellent", "my family loved it", "my kids laughed the whole time", "the ending is beautiful",
        "it made me laugh out loud", "it kept me interested until the end", "the story is full of heart",
        "I recommend it to everyone", "it is one of the best movies of the year", "the actors are wonderful",
        "everyone in the theater enjoyed it", "it is a lot of fun", "I was happy from start to finish",
        "the music is lovely", "it has a great sense of humor", "the jokes are really funny",
        "I am glad that I went to see it", "it deserves an award", "the final scene is perfect",
    ),
    "negative": (
        "I hated every minute of it", "I would not watch it again if you paid me", "I left the theater angry",
        "the cast is wasted", "my family hated it", "my kids were bored the whole time", "the ending is stupid",
        "it made me sad that I had paid for it", "it lost me after ten minutes", "the story is a mess",
        "I do not recommend it to anyone", "it is one of the worst movies of the year", "the actors are terrible",
        "everyone in the theater was bored", "it is a waste of time", "I was bored from start to finish",
        "the music is annoying", "it has no sense of humor and it is dull", "the jokes fail badly",
        "I am sorry that I went to see it", "it insults the audience", "the final scene is awful",
    ),
    "neutral": (
        "I saw it with my brother", "it takes place in a small town", "the story is about a family",
        "I have not read the book", "it is two hours long", "there is not much more to say",
        "I will wait for the next one", "the rest is what you would expect", "it ends where it began",
        "I thought about it on the way home", "you can watch it on a rainy afternoon",
    ),
}  # fmt: skip
WHOLE = {
    "positive": (
        "tells a simple story with great skill", "made me laugh and cry", "is a sweet story about friendship",
        "is funny, warm and full of heart", "is a clever thriller with a brilliant twist", "has a wonderful cast",
        "is a beautiful story about love", "is a great movie for the whole family", "deserves to be a big success",
        "kept me on the edge of my seat, and I loved it", "is a treat for the eyes", "is an honest and moving drama",
        "gave me so much joy that I watched it twice", "has so many good ideas and great jokes",
        "is exciting from the first scene to the last", "is much better than the first one",
    ),
    "negative": (
        "tells a stupid story very badly", "made me angry and sad", "is a dull story about people nobody cares about",
        "is slow, ugly and boring", "is a lazy thriller with a stupid twist", "has a terrible script",
        "is a boring story with no ideas", "is a bad movie for the whole family", "deserves to be a failure",
        "put me to sleep, and I hated it", "is an insult to the audience", "is a weak and confused drama",
        "gave me such a headache that I hated it", "has too many bad ideas and awful jokes",
        "is boring from the first scene to the last", "is much worse than the first one",
    ),
    "neutral": (
        "tells the story of two brothers", "follows a young man who leaves home", "takes place in a hotel by the sea",
        "is about a family that moves to the city", "is based on a book that I have not read",
        "has a long first half and a short second half", "was made by the same people as the last one",
        "is about a woman who looks for her sister", "shows one day in the life of a teacher",
        "was not what I expected", "is longer than it has to be", "ends the way you think it will",
    ),
}  # fmt: skip
MINE = {
    "positive": (
        "was happy to see such a good movie", "loved the story and the characters", "enjoyed it very much",
        "laughed from the first scene to the last", "was surprised by how good it was", "really liked the cast",
        "cried happy tears at the end", "had a great time and wanted to see it again", "thought it was wonderful",
    ),
    "negative": (
        "was angry to see such a bad movie", "hated the story and the characters", "disliked it very much",
        "was bored from the first scene to the last", "was disappointed by how bad it was", "really hated the cast",
        "fell asleep because it was so boring", "had a terrible time and wanted to leave", "thought it was awful",
    ),
    "neutral": (
        "saw it on the first day", "did not know what to think of it", "expected something else",
        "went to see it because of the book", "had seen most of it before", "thought it was about average",
        "talked about it on the way home", "have nothing more to say about it",
    ),
}  # fmt: skip
MOVIES = (
    "This movie", "This film", "The movie", "The film", "The whole film", "The whole movie", "The new movie",
    "The sequel", "The documentary", "The director's last film", "This little film", "This drama", "This comedy",
)  # fmt: skip
PEOPLE = (
    "I", "We", "My family and I", "My wife and I", "My husband and I", "My friends and I", "My brother and I",
    "My kids and I",
)  # fmt: skip
WHEN = (
    "From the first scene", "By the end", "After the first hour", "After twenty minutes", "In the end",
    "At the end", "When the credits rolled", "This time", "Last night", "On the big screen", "After the first half",
)  # fmt: skip
LEADS = ("I thought ", "I think ", "I found that ", "I felt that ", "You can tell that ", "My friends said ")


def subject(rng: random.Random, kind: str) -> str:
    """A subject with its verb, such as ``the acting is`` or ``the jokes were``."""
    plural = rng.random() < 0.35
    noun = rng.choice(PLURAL_ASPECTS if plural else ASPECTS)
    where = rng.choice(("", "", "", "", " in this film", " in this movie", " in the second half", " of the film"))
    adjective = rng.choice(ADJECTIVES[kind])
    one_thing = adjective.startswith(("a ", "the ", "one "))
    if plural and one_thing:
        adjective, one_thing = ADJECTIVES[kind][0], False
    verbs = ["are", "were"] if plural else ["is", "was"]
    if not one_thing and len(adjective.split()) < 3:
        verbs += ["look", "feel"] if plural else ["feels", "seems"]
    verb = rng.choice(verbs)
    return f"the {noun}{where} {verb} {adjective}"


def clause(rng: random.Random, kind: str) -> str:
    """A whole clause of one sentiment that starts in lower case unless its first word is ``I``, ``My`` or ``We``."""
    draw = rng.random()
    if draw < 0.5:
        text = subject(rng, kind)
        return rng.choice(LEADS) + text if rng.random() < 0.2 else text
    if draw < 0.75:
        movie = rng.choice(MOVIES)
        return f"{movie[0].lower()}{movie[1:]} {rng.choice(WHOLE[kind])}"
    people, mine = rng.choice(PEOPLE), rng.choice(MINE[kind])
    if people != "I":
        mine = mine.replace("was ", "were ", 1) if mine.startswith("was ") else mine
    if rng.random() < 0.6:
        return f"{people} {mine}"
    return f"{rng.choice(WHEN)} {inside(people)} {mine}"


def inside(text: str) -> str:
    """`text` as it is written inside a sentence: in lower case, unless it starts with ``I``."""
    return text if text.startswith("I ") or text == "I" else text[0].lower() + text[1:]


def sentence(rng: random.Random, kind: str) -> str:
    """One review of one or two clauses; neutral ones may say something good and something bad."""
    first = clause(rng, kind)
    draw = rng.random()
    if kind == "neutral" and draw < 0.4:
        good, bad = rng.sample(("positive", "negative"), 2)
        text = f"{clause(rng, good)}, but {rng.choice(TAILS[bad])}"
    elif draw < 0.6:
        text = f"{first}, and {rng.choice(TAILS[kind])}"
    elif draw < 0.7:
        text = f"{rng.choice(('although', 'even though'))} {inside(clause(rng, 'neutral'))}, {rng.choice(TAILS[kind])}"
    else:
        text = first
    return f"{text[0].upper()}{text[1:]}."


def sentences(count: int, seed: int) -> list[str]:
    """`count` distinct sentences, two in five positive, two in five negative."""
    rng = random.Random(seed)
    kinds = ("positive", "negative", "positive", "negative", "neutral")
    found: dict[str, None] = {}
    while len(found) < count:
        found[sentence(rng, kinds[len(found) % 5])] = None
    return list(found)
