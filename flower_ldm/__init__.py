"""Class-conditional latent diffusion, autoencoder included, from a folder of labelled images to the Hugging Face Hub.

data -> autoencoder_losses -> FlowerAutoencoderKL -> latent_cache -> diffusion -> FlowerUNet2DModel -> EMA
     -> FlowerLDMPipeline -> evaluation + visualization -> report + model_card
"""

from pipelines.pipeline_flower_ldm import FlowerLDMPipeline

from .models.autoencoder_flower import FlowerAutoencoderKL
from .models.unet_flower import FlowerUNet2DModel

__version__ = "0.1.0"
__all__ = ["FlowerAutoencoderKL", "FlowerLDMPipeline", "FlowerUNet2DModel"]
