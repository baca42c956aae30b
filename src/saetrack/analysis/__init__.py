"""Analyses of a track: the contract, discovery, the sweep over LLM checkpoints, and the built-in ones.

An analysis reads a track and never writes to its snapshots; results go to ``analyses/NAME`` inside the track.
"""

from .base import Analysis, AnalysisResult, AnyAnalysis, Observation, Probe, SplitObservation, SweepAnalysis

__all__ = ["Analysis", "AnalysisResult", "AnyAnalysis", "Observation", "Probe", "SplitObservation", "SweepAnalysis"]
