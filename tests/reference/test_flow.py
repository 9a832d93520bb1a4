"""The oracle against FrEIA 0.2, with FrEIA's own weights: forward, inverse and every gradient to 1e-12 in float64."""

from __future__ import annotations

import pytest
import torch

from fastbgad import reference
from fastbgad.flow_spec import FlowSpec
from fastbgad.model.flow import ConditionalFlow
from tests.flows import freia_flow, relative_error

SPECS = [
    FlowSpec(8, condition_channels=16, coupling_layers=3),
    FlowSpec(9, condition_channels=16, coupling_layers=3),
    FlowSpec(41, condition_channels=128, coupling_layers=8),
    FlowSpec(10, condition_channels=0, coupling_layers=2),
    FlowSpec(10, condition_channels=8, coupling_layers=2, hard_permutation=True),
    FlowSpec(7, condition_channels=8, coupling_layers=2, global_affine="SIGMOID"),
    FlowSpec(7, condition_channels=8, coupling_layers=2, global_affine="EXP", clamp=0.7),
    FlowSpec(2, condition_channels=4, coupling_layers=1),
]


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_equals_freia(spec: FlowSpec) -> None:
    theirs = freia_flow(spec)
    ours = ConditionalFlow(spec).double()
    assert ours.load_state_dict(theirs.state_dict(), strict=True)

    x = torch.randn(17, spec.channels, dtype=torch.float64, requires_grad=True)
    p = torch.randn(17, spec.condition_channels, dtype=torch.float64) if spec.condition_channels else None
    condition = [] if p is None else [p]
    their_z, their_log_det = theirs(x, condition)
    d_z, d_log_det = torch.randn_like(their_z), torch.randn_like(their_log_det)
    their_parameters = dict(theirs.named_parameters())
    trained = [name for name, parameter in their_parameters.items() if parameter.requires_grad]
    exact = torch.autograd.grad(
        [their_z, their_log_det], [x, *(their_parameters[name] for name in trained)], [d_z, d_log_det]
    )

    z, log_det = reference.flow_forward(x, ours.weights(), spec, p)
    assert relative_error(z, their_z) < 1e-12
    assert relative_error(log_det, their_log_det) < 1e-12
    our_parameters = dict(ours.named_parameters())
    got = torch.autograd.grad([z, log_det], [x, *(our_parameters[name] for name in trained)], [d_z, d_log_det])
    for name, ours_d, theirs_d in zip(["x", *trained], got, exact, strict=True):
        assert relative_error(ours_d, theirs_d) < 1e-12, name

    back, log_det_back = reference.flow_inverse(z, ours.weights(), spec, p)
    their_back, their_log_det_back = theirs(z, condition, rev=True)
    assert relative_error(back, their_back) < 1e-12
    assert relative_error(log_det_back, their_log_det_back) < 1e-12
    assert relative_error(back, x) < 1e-10
    assert relative_error(log_det_back, -log_det) < 1e-10


def test_state_dict_goes_back_into_freia() -> None:
    spec = FlowSpec(12, condition_channels=8, coupling_layers=2)
    theirs = freia_flow(spec)
    ours = ConditionalFlow(spec, seed=3).double()
    assert theirs.load_state_dict(ours.state_dict(), strict=True)
    x, p = torch.randn(5, 12, dtype=torch.float64), torch.randn(5, 8, dtype=torch.float64)
    assert relative_error(reference.flow_forward(x, ours.weights(), spec, p)[0], theirs(x, [p])[0]) < 1e-12


def test_log_det_is_that_of_the_jacobian() -> None:
    """Against the Jacobian that autograd builds, for both clamp forms: FrEIA 0.2 has only one of them."""
    for form in ("tanh", "scaled_tanh"):
        spec = FlowSpec(6, condition_channels=4, coupling_layers=3, clamp=0.8, clamp_form=form)
        flow = ConditionalFlow(spec).double()
        with torch.no_grad():
            for parameter in flow.parameters():
                if parameter.requires_grad:
                    parameter += 0.5 * torch.randn_like(parameter)
            for layer in flow.module_list:
                layer.w_perm.copy_(torch.linalg.qr(layer.w_perm)[0])
        x, p = torch.randn(1, 6, dtype=torch.float64), torch.randn(1, 4, dtype=torch.float64)
        jacobian = torch.autograd.functional.jacobian(
            lambda row, flow=flow, spec=spec, p=p: reference.flow_forward(row, flow.weights(), spec, p)[0], x
        ).reshape(6, 6)
        log_det = reference.flow_forward(x, flow.weights(), spec, p)[1]
        assert torch.allclose(log_det[0], torch.linalg.slogdet(jacobian)[1], rtol=0, atol=1e-12)


def test_clamp_forms_differ_as_defined() -> None:
    """s = clamp tanh(a) saturates earlier than clamp tanh(a / clamp); both are bounded by the clamp."""
    specs = [FlowSpec(4, condition_channels=0, coupling_layers=1, clamp_form=f) for f in ("tanh", "scaled_tanh")]
    flow = ConditionalFlow(specs[0]).double()
    x1 = 50 * torch.randn(64, 2, dtype=torch.float64)
    s = [reference.flow.log_scale_and_shift(x1, flow.weights()[0], spec, None)[0] for spec in specs]
    a = torch.atanh(s[0] / 1.9)
    assert torch.allclose(s[1], 1.9 * torch.tanh(a / 1.9), atol=1e-12)
    assert all((value.abs() <= 1.9).all() for value in s)


def test_log_likelihood_is_a_density() -> None:
    """exp(C lp) of a two-dimensional flow integrates to one over the plane."""
    spec = FlowSpec(2, condition_channels=0, coupling_layers=3)
    flow = ConditionalFlow(spec, seed=1).double()
    axis = torch.linspace(-12, 12, 401, dtype=torch.float64)
    grid = torch.cartesian_prod(axis, axis)
    z, log_det = reference.flow_forward(grid, flow.weights(), spec)
    density = torch.exp(2 * reference.log_likelihood(z, log_det))
    assert abs(float(density.detach().sum()) * 0.06**2 - 1) < 1e-3
