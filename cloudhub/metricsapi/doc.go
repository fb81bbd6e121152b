// Package metricsapi serves metrics.k8s.io from within the API server, so that
// kubectl top and the horizontal pod autoscaler work with nothing installed.
//
// A node is asked for its stats summary only when somebody asks for its
// metrics, and at most once per CacheFor: an idle link carries nothing. What
// cannot be asked or answers without figures is absent from lists and "not
// found" by name; it is never reported as zero.
//
// It keeps no history and writes nothing about nodes or pods anywhere.
package metricsapi
