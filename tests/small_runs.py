"The configuration of small, short runs on arrays that a test makes up."

from csrae_nb.config import Config

SMALL = Config(
    dataset="arrays",
    epochs=2,
    warmup=1,
    kmeans_epoch=1,
    batch_size=20,
    latent_dim=2,
    components=4,
    ll_samples=2,
    expost_components=3,
)
