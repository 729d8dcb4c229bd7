"""The cards of a node, real or modelled, behind one interface.

`base.DeviceBackend` is the interface; `simulated.SimulatedBackend(parse_cards("8xH100-80GB"), node)` models cards (and
`simulated.simulated_host(cards)` the host around them); `nvml.NvmlBackend()` reads real ones through NVIDIA's driver.
"""
