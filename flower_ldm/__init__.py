"""Class-conditional latent diffusion, autoencoder included, from a folder of labeled images to the Hugging Face Hub.

data -> autoencoder_losses -> FlowerAutoencoderKL -> latent_cache -> diffusion -> FlowerUNet2DModel -> EMA
     -> FlowerLDMPipeline -> evaluation + visualization -> report + model_card
"""

from pathlib import Path

__version__ = "0.1.0"
__all__ = ["FlowerAutoencoderKL", "FlowerLDMPipeline", "FlowerUNet2DModel"]

# Installed, pipelines/ lies in this folder. In a clone it lies beside this folder, at the top of the repository.
if not (Path(__file__).parent / "pipelines").is_dir():
    __path__.append(str(Path(__file__).parent.parent))

from .models.autoencoder_flower import FlowerAutoencoderKL  # noqa: E402
from .models.unet_flower import FlowerUNet2DModel  # noqa: E402
from .pipelines.pipeline_flower_ldm import FlowerLDMPipeline  # noqa: E402
