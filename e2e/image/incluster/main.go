// Command incluster is a client of the Kubernetes API as pods have it:
// client-go with its in-cluster configuration, and nothing of Skerry's. Without
// arguments it waits to be told to end.
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/cache"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	defer stop()
	if len(os.Args) == 1 {
		<-ctx.Done()
		return
	}
	ctx, cancel := context.WithTimeout(ctx, 20*time.Second)
	defer cancel()
	if err := run(ctx, os.Args[1], os.Args[2:]); err != nil {
		fmt.Fprintln(os.Stderr, "incluster:", err)
		os.Exit(1)
	}
}

// run does one thing: host | informer NAMESPACE | list pods|secrets NAMESPACE |
// create NAMESPACE | request METHOD PATH [BODY] | token.
func run(ctx context.Context, verb string, args []string) error {
	config, err := rest.InClusterConfig()
	if err != nil {
		return err
	}
	client, err := kubernetes.NewForConfig(config)
	if err != nil {
		return err
	}
	switch {
	case verb == "token":
		token, err := os.ReadFile(config.BearerTokenFile)
		fmt.Print(string(token))
		return err
	case verb == "request" && (len(args) == 2 || len(args) == 3):
		// Of no API group: by the address and the token alone.
		req := client.CoreV1().RESTClient().Verb(args[0]).AbsPath(args[1])
		if len(args) == 3 {
			req = req.Body([]byte(args[2])).SetHeader("Content-Type", "application/json")
		}
		raw, err := req.Do(ctx).Raw()
		fmt.Print(string(raw))
		return err
	case verb == "host":
		fmt.Println(config.Host)
		return nil
	case verb == "informer" && len(args) == 1:
		return informer(ctx, client, args[0])
	case verb == "list" && len(args) == 2:
		if args[0] == "secrets" {
			_, err := client.CoreV1().Secrets(args[1]).List(ctx, metav1.ListOptions{})
			return err
		}
		_, err := client.CoreV1().Pods(args[1]).List(ctx, metav1.ListOptions{})
		return err
	case verb == "create" && len(args) == 1:
		_, err := client.CoreV1().ConfigMaps(args[0]).Create(ctx, &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Name: "made-in-a-pod"}}, metav1.CreateOptions{})
		return err
	}
	return errors.New("no command " + verb + " " + strings.Join(args, " "))
}

// informer prints a namespace's pods as a controller comes to know them.
func informer(ctx context.Context, client kubernetes.Interface, namespace string) error {
	factory := informers.NewSharedInformerFactoryWithOptions(client, 0, informers.WithNamespace(namespace))
	pods := factory.Core().V1().Pods()
	synced := pods.Informer().HasSynced
	factory.Start(ctx.Done())
	if !cache.WaitForCacheSync(ctx.Done(), synced) {
		return errors.New("the informer did not sync")
	}
	all, err := pods.Lister().List(labels.Everything())
	for _, p := range all {
		fmt.Println(p.Name)
	}
	return err
}
