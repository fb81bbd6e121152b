package controlplane

import (
	"context"
	"fmt"

	"k8s.io/component-base/configz"
	kcm "k8s.io/kubernetes/cmd/kube-controller-manager/app"
	kcmoptions "k8s.io/kubernetes/cmd/kube-controller-manager/app/options"
	scheduler "k8s.io/kubernetes/cmd/kube-scheduler/app"
	scheduleroptions "k8s.io/kubernetes/cmd/kube-scheduler/app/options"
)

// runControllerManager runs kube-controller-manager until ctx ends.
func runControllerManager(ctx context.Context, flags []string) error {
	o, err := kcmoptions.NewKubeControllerManagerOptions()
	if err != nil {
		return fmt.Errorf("control plane: controller manager options: %w", err)
	}
	known, disabled, aliases := kcm.KnownControllers(), kcm.ControllersDisabledByDefault(), kcm.ControllerAliases()
	sets := o.Flags(known, disabled, aliases)
	o.ParsedFlags = &sets
	if err := parse("controller manager", sets, flags); err != nil {
		return err
	}
	config, err := o.Config(ctx, known, disabled, aliases)
	if err != nil {
		return fmt.Errorf("control plane: configure the controller manager: %w", err)
	}
	// It registers its configuration for the process and never takes it back.
	defer configz.Delete(kcm.ConfigzName)
	if err := kcm.Run(ctx, config.Complete()); err != nil {
		return fmt.Errorf("control plane: controller manager: %w", err)
	}
	return nil
}

// runScheduler runs kube-scheduler until ctx ends. Without leader election it
// returns an error even then; the caller tells by ctx.
func runScheduler(ctx context.Context, flags []string) error {
	o := scheduleroptions.NewOptions()
	if err := parse("scheduler", *o.Flags, flags); err != nil {
		return err
	}
	config, sched, err := scheduler.Setup(ctx, o)
	if err != nil {
		return fmt.Errorf("control plane: configure the scheduler: %w", err)
	}
	defer configz.Delete("componentconfig")
	if err := scheduler.Run(ctx, config, sched); err != nil {
		return fmt.Errorf("control plane: scheduler: %w", err)
	}
	return nil
}
