"""Joint segmentation of brain tissue and white-matter lesions from T1w and FLAIR scans."""

__version__ = '0.2.0.dev0'
