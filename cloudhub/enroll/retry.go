package enroll

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/skerry-io/skerry/tunnel/edgeapi"
)

// retryConflicts runs op, which reads and writes one object, until its write
// meets no conflict. Every conflict means that somebody else got on, so the
// bound is ctx's.
func retryConflicts(ctx context.Context, op func() error) error {
	for wait := 5 * time.Millisecond; ; wait = min(2*wait, 250*time.Millisecond) {
		err := op()
		if !apierrors.IsConflict(err) {
			return err
		}
		timer := time.NewTimer(rand.N(wait) + time.Millisecond)
		select {
		case <-timer.C:
		case <-ctx.Done():
			timer.Stop()
			return fmt.Errorf("%w; last: %w", context.Cause(ctx), err)
		}
	}
}

// joinUpdateError keeps refusals and hides what the API server said.
func joinUpdateError(err error) error {
	var refusal *edgeapi.JoinError
	switch {
	case err == nil, errors.As(err, &refusal):
		return err
	case errors.Is(err, ErrNoToken):
		return refuseUnknownToken()
	}
	return &unavailable{"update join token", err}
}

// deleteExactly deletes secret only as it was read.
func deleteExactly(secret *corev1.Secret) metav1.DeleteOptions {
	opts := metav1.DeleteOptions{Preconditions: &metav1.Preconditions{}}
	if secret.UID != "" {
		opts.Preconditions.UID = &secret.UID
	}
	if secret.ResourceVersion != "" {
		opts.Preconditions.ResourceVersion = &secret.ResourceVersion
	}
	return opts
}

func stamp(t time.Time) string { return t.UTC().Format("2006-01-02 15:04:05 UTC") }

// roughly writes a duration the way people say it.
func roughly(d time.Duration) string {
	if d < 0 {
		d = -d
	}
	switch {
	case d < 2*time.Minute:
		return fmt.Sprintf("%d seconds", int(d.Seconds()))
	case d < 2*time.Hour:
		return fmt.Sprintf("%d minutes", int(d.Minutes()))
	case d < 48*time.Hour:
		return fmt.Sprintf("%d hours", int(d.Hours()))
	}
	return fmt.Sprintf("%d days", int(d.Hours()/24))
}
