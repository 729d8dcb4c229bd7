"""The agent's core, pure: desired against actual. `agent.AgentCore` is its one entrance."""

from gpuyard_agent.core.agent import AgentCore

__all__ = ["AgentCore"]
