"""diffusers' TextToVideoSDPipeline: ModelScope, zeroscope, VideoCrafter2 and the shipped model."""
